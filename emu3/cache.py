"""A static key/value cache: allocated once, every row is filled from its first slot.

Keys, values and lengths are updated in place, so that a CUDA graph can hold a decode step.

``B`` rows, ``T`` new tokens, ``H`` query heads, ``K`` head dim.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from emu3.config import ModelSettings
from emu3_kernels import attention, decode_attention
from emu3_kernels.runtime.checks import check_values
from emu3_kernels.runtime.library import advise_huge_pages

MOST_NEW = 64
"""Most tokens of one ``decode_attention`` call."""


@dataclass(frozen=True)
class Tree:
    """How the new tokens of a row are related, if not in sequence; none is appended yet."""

    depths: Tensor
    """``[B, T]`` int64: positions after the length of the row."""
    mask: Tensor
    """``[B, T]`` int64 words of :func:`emu3_kernels.decode_attention`."""


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
        self.max_positions = settings.max_position_embeddings
        self.capacity = min(capacity, self.max_positions)
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

    def place(self, num_new: int, tree: Tree | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return where the next ``num_new`` tokens of each row go, once for all layers.

        That the slots lie in the cache is checked here, on the host: no length exceeds
        ``longest``.

        Returns:
            ``[B, T]`` int64 slots, the ``[B]`` int32 lengths with the new tokens, and the positions
            of a tree like the slots; None if they are the slots. Beyond the last position of the
            model, only drafts that will not be kept may be in a tree: they share that one.
        """
        lengths = self.lengths[:, None].long()
        slots = lengths + torch.arange(num_new, device=self.lengths.device)
        if tree is None:
            self.check_room(num_new)
            return slots, self.lengths + num_new, None
        if self.longest + num_new > self.keys.shape[2]:
            raise ValueError(
                f"KeyValueCache: {self.longest + num_new} slots exceed its {self.keys.shape[2]}"
            )
        positions = (lengths + tree.depths).clamp(max=self.max_positions - 1)
        return slots, self.lengths + num_new, positions

    def check_room(self, num_new: int) -> None:
        """Raise unless ``num_new`` more tokens fit."""
        needed = self.longest + num_new
        if needed > self.capacity:
            raise ValueError(
                f"KeyValueCache: {needed} positions exceed its capacity {self.capacity}"
            )

    def attend(self, layer: int, q: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of ``q [B, T, H, K]`` of new tokens; their keys and values are in the cache.

        Up to ``MOST_NEW`` tokens are decoded, each row up to its own length; more are a prompt or
        its next chunk, and then all rows must have the same length.

        Args:
            layer: its index.
            q: the rotated queries.
            lengths: ``[B]`` int32, with the new tokens: of :meth:`place`.
            mask: of a :class:`Tree`.
        """
        num_new, keys, values = q.shape[1], self.keys[layer], self.values[layer]
        if self.longest and num_new <= MOST_NEW:
            return decode_attention(q, keys, values, lengths, mask=mask)
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

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy one token of a tree to its place, in all layers.

        Args:
            source: ``[B]`` int64, which of the new tokens of each row.
            target: ``[B]`` int64, which one it replaces.
        """
        rows, lengths = torch.arange(len(source), device=source.device), self.lengths.long()
        for tensor in (self.keys, self.values):
            tensor[:, rows, lengths + target] = tensor[:, rows, lengths + source]

    def keep(self, counts: Tensor) -> None:
        """Append the first ``counts [B]`` tokens of a tree to each row; no row exceeds ``longest``.

        ``lengths`` is updated in place, and ``longest`` must be set beforehand.
        """
        self.lengths += counts.int()
