"""A static key/value cache: allocated once, every row is filled from its first slot.

Keys, values and lengths are updated in place, so that a CUDA graph can hold a decode step.

``B`` rows, ``T`` new tokens, ``H`` query heads, ``K`` head dim.
"""

from copy import copy

import torch
from torch import Tensor
from typing_extensions import Self

from emu3.config import ModelSettings
from emu3_kernels import attention, decode_attention
from emu3_kernels.runtime.checks import check_values
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
        self.capacity = min(capacity, settings.max_position_embeddings)
        self.longest, self.ragged = 0, False
        """The largest length, and whether others are shorter, without a synchronization."""

    def rows(self, start: int, stop: int) -> Self:
        """Rows ``start`` to ``stop`` as a cache that shares keys, values and lengths.

        ``longest`` and ``ragged`` are its own: set them for what the rows hold.
        """
        part = copy(self)
        part.keys, part.values = self.keys[:, start:stop], self.values[:, start:stop]
        part.lengths = self.lengths[start:stop]
        return part

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy a row of ``length`` tokens over another."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :length] = tensor[:, source, :length]
        self.lengths[target] = self.lengths[source]

    def place(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return where the next ``num_new`` tokens of each row go, once for all layers.

        That the slots lie in the cache is checked here, on the host: no length exceeds
        ``longest``.

        Returns:
            ``[B, T]`` int64 slots, which are the positions too, and the ``[B]`` int32 lengths with
            the new tokens.
        """
        self.check_room(num_new)
        new = torch.arange(num_new, device=self.lengths.device)
        return self.lengths[:, None].long() + new, self.lengths + num_new

    def check_room(self, num_new: int) -> None:
        """Raise unless ``num_new`` more tokens fit."""
        needed = self.longest + num_new
        if needed > self.capacity:
            raise ValueError(
                f"KeyValueCache: {needed} positions exceed its capacity {self.capacity}"
            )

    def attend(self, layer: int, q: Tensor, lengths: Tensor) -> Tensor:
        """Attention of ``q [B, T, H, K]`` of new tokens; their keys and values are in the cache.

        Up to ``MOST_NEW`` tokens are decoded, each row up to its own length; more are a prompt or
        its next chunk, and then all rows must have the same length.

        Args:
            layer: its index.
            q: the rotated queries.
            lengths: ``[B]`` int32, with the new tokens: of :meth:`place`.
        """
        num_new, keys, values = q.shape[1], self.keys[layer], self.values[layer]
        if self.longest and num_new <= MOST_NEW:
            return decode_attention(q, keys, values, lengths)
        if self.ragged:
            raise ValueError(
                f"KeyValueCache: rows of different lengths take at most {MOST_NEW} tokens a call, "
                f"got {num_new}"
            )
        stop = self.longest + num_new
        return attention(q, keys[:, :stop], values[:, :stop])

    def advance(self, num_new: int, prompt_lengths: Tensor | None = None) -> None:
        """Append ``num_new`` tokens to every row, or the first ``prompt_lengths [B]`` of them.

        ``lengths`` is updated in place, so that a CUDA graph may hold it.
        """
        if prompt_lengths is None:
            self.lengths += num_new
        else:
            fits = ((prompt_lengths >= 0) & (prompt_lengths <= num_new)).all()
            must = f"prompt_lengths must lie in [0, {num_new}]"
            check_values("KeyValueCache", fits, must, lambda: str(prompt_lengths.tolist()))
            self.lengths += prompt_lengths.int()
        self.longest += num_new
        self.ragged |= prompt_lengths is not None
