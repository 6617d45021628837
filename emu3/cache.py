"""A static key/value cache: allocated once, every row filled from its first slot.

``L`` layers, ``B`` rows, ``S`` slots, ``G`` key/value heads, ``K`` head width.
"""

import torch
from torch import Tensor

from emu3.config import ModelSettings
from emu3_kernels import attention, decode_attention
from emu3_kernels.runtime.library import advise_huge_pages

MOST_NEW = 16
"""Tokens that ``decode_attention`` takes at once."""


class KeyValueCache:
    """Keys and values of ``B`` rows, each from slot 0 to its own length.

    A token's slot is its position. Rows of a ragged batch are padded on the right: what their
    padding leaves behind a row's length is never read, and the row's next tokens overwrite it.

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
        shape = settings.layers, batch, capacity, settings.kv_heads, settings.head_width
        self.keys, self.values = (
            advise_huge_pages(torch.empty(shape, dtype=dtype, device=device)).zero_()
            for _ in range(2)
        )
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest, self.ragged = 0, False
        """The largest length, and whether others are shorter, known without asking the device."""

    def slots(self, num_new: int) -> Tensor:
        """``[B, T]`` int64 slots, and positions, of the next ``num_new`` tokens of each row."""
        capacity = self.keys.shape[2]
        if self.longest + num_new > capacity:
            raise ValueError(
                f"KeyValueCache: {self.longest + num_new} positions exceed its capacity {capacity}"
            )
        return self.lengths[:, None].long() + torch.arange(num_new, device=self.lengths.device)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend from ``q [B, T, H, K]`` of new tokens, whose keys and values are in their slots.

        Few tokens are decoded, each row up to its own length; many are a prompt, or the next part
        of one, for which all rows must be equally long.
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

    def advance(self, num_new: int, counts: Tensor | None = None) -> None:
        """Make ``num_new`` tokens part of every row, or the first ``counts [B]`` of them."""
        self.lengths = self.lengths + (num_new if counts is None else counts.int())
        self.longest += num_new
        self.ragged |= counts is not None
