"""A static key/value cache: allocated once, every row is filled from its first slot.

``B`` rows, ``T`` new tokens, ``H`` query heads, ``K`` head dim.
"""

import torch
from torch import Tensor

from emu3.config import ModelSettings
from emu3_kernels import attention, decode_attention
from emu3_kernels.runtime.library import advise_huge_pages

MOST_NEW = 16
"""Most tokens of one ``decode_attention`` call."""


class KeyValueCache:
    """Keys and values of ``B`` rows, each from slot 0 to its own length.

    A token's slot is its position. Rows of a ragged batch are padded on the right: keys and values
    of padding, behind a row's length, are never read, and the row's next tokens overwrite them.

    Args:
        settings: the model's shape.
        batch: rows.
        capacity: slots of a row, the padding of the longest call included.
    """

    def __init__(
        self,
        settings: ModelSettings,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        shape = settings.num_layers, batch, capacity, settings.num_kv_heads, settings.head_dim
        self.keys, self.values = (
            advise_huge_pages(torch.empty(shape, dtype=dtype, device=device)).zero_()
            for _ in range(2)
        )
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest, self.ragged = 0, False
        """The largest length, and whether others are shorter, without a synchronization."""

    def slots(self, num_new: int) -> Tensor:
        """``[B, T]`` int64 slots, and positions, of the next ``num_new`` tokens of each row."""
        capacity = self.keys.shape[2]
        if self.longest + num_new > capacity:
            raise ValueError(
                f"KeyValueCache: {self.longest + num_new} positions exceed its capacity {capacity}"
            )
        return self.lengths[:, None].long() + torch.arange(num_new, device=self.lengths.device)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of ``q [B, T, H, K]`` of new tokens; their keys and values are in the cache.

        Up to ``MOST_NEW`` tokens are decoded, each row up to its own length; more are a prompt or
        its next chunk, and then all rows must have the same length.
        """
        num_new, keys, values = q.shape[1], self.keys[layer], self.values[layer]
        if self.longest and num_new <= MOST_NEW:
            return decode_attention(q, keys, values, self.lengths + num_new)
        if self.ragged:
            raise ValueError(
                f"KeyValueCache: rows of different lengths take at most {MOST_NEW} tokens a call, "
                f"got {num_new}"
            )
        stop = self.longest + num_new
        return attention(q, keys[:, :stop], values[:, :stop])

    def advance(self, num_new: int, prompt_lengths: Tensor | None = None) -> None:
        """Append ``num_new`` tokens to every row, or the first ``prompt_lengths [B]`` of them."""
        self.lengths = self.lengths + (num_new if prompt_lengths is None else prompt_lengths.int())
        self.longest += num_new
        self.ragged |= prompt_lengths is not None
