"""Counter-based dropout: whether an element is kept depends on the seed and its indices alone.

Philox 4x32-10, from "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., SC'11). Key: the
64 bits of the seed. Counter: ``(column // 4, row, head, 0)``; the element uses word ``column % 4``
and is kept iff that word is at least ``p * 2**32``. Every backend computes the same words, and so
does a rank that knows which rows and heads of the whole it holds. This file is the definition, in
plain PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from emu3_kernels.runtime.checks import describe

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
LOWER = 0xFFFFFFFF


class HeadShard(NamedTuple):
    """The attention heads of a rank: ``first … `` of the ``num_heads`` of each sequence.

    Its sequences are ``first_sequence …`` of the batch of all ranks.
    """

    num_heads: int
    first: int = 0
    first_sequence: int = 0

    @property
    def first_index(self) -> int:
        """The index of the rank's first head among the heads of all sequences."""
        return self.first_sequence * self.num_heads + self.first


def site_seeds(seed: int, step: int, num: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the seeds ``[num]`` int64 of the sites of dropout in a step, the same on every rank.

    They are words of Philox: key ``seed``, counter ``(site, step, 0, 0)``. A step that is repeated,
    by a checkpoint of activations or by a run that continues, drops the same elements.
    """
    key, site = torch.tensor(seed), torch.arange(num)
    high, low, *_ = philox(key, site, torch.full_like(site, step), *[torch.zeros_like(site)] * 2)
    return (high << 32 | low).to(device)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, 0-d int64, from torch's default generator of ``device``."""
    return torch.randint(torch.iinfo(torch.int64).max, (), device=device)


def drop_below(p: float) -> int:
    """Return the smallest word of a kept element: it fits in 32 bits, so that p stays below 1."""
    return min(round(p * 2**32), LOWER)


def keep_scale(p: float) -> float:
    """Return the factor of the kept elements, which preserves the mean."""
    return 1 / (1 - p)


def keep(
    seed: Tensor, p: float, row: Tensor | int, column: Tensor | int, head: Tensor | int = 0
) -> Tensor:
    """Return a bool for each element, true if dropout keeps it; the indices broadcast.

    Args:
        seed: 0-d int64; all 64 bits are used.
        p: probability that an element is dropped, in ``[0, 1)``.
        row: int64 tensor or number; its lower 32 bits are used, as are those of the next two.
        column: channel, or key of an attention.
        head: ``batch * H + head`` of an attention, counted over all ranks; 0 elsewhere.
    """
    indices = row, column, head
    row, column, head = (torch.as_tensor(index, device=seed.device) for index in indices)
    words = philox(seed, column >> 2, row, head, torch.zeros_like(head))
    first, second = (torch.where(column % 4 == i, words[i], words[i + 2]) for i in (0, 1))
    return torch.where(column % 2 == 0, first, second) >= drop_below(p)


def philox(key: Tensor, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypt the four words of ``counter`` in ten rounds. A word is the lower half of an int64."""
    a, b, c, d = counter
    for i in range(10):
        # A product wraps around at 64 bits; LOWER masks the sign extension of its shift.
        x, y = (MULTIPLIERS[0] * (a & LOWER)), (MULTIPLIERS[1] * (c & LOWER))
        a, c = (y >> 32) ^ b ^ (key + i * WEYL[0]), (x >> 32) ^ d ^ ((key >> 32) + i * WEYL[1])
        b, d = y, x
    return a & LOWER, b & LOWER, c & LOWER, d & LOWER


def check_dropout_rows(op: str, x: Tensor, rows: Tensor) -> None:
    """Raise unless ``rows`` is int64 on the device of ``x``, one for each of its rows."""
    alike = rows.dtype == torch.int64 and rows.shape == x.shape[:-1] and rows.device == x.device
    if not alike:
        raise ValueError(
            f"{op}: dropout_rows must be {tuple(x.shape[:-1])} torch.int64 {x.device}, "
            f"got {describe(rows)}"
        )


def check_dropout_heads(op: str, num_heads: int, shard: HeadShard) -> None:
    """Raise unless the ``num_heads`` of a rank are among those of ``shard``."""
    first, last = shard.first, shard.first + num_heads
    if first < 0 or last > shard.num_heads or shard.first_sequence < 0:
        raise ValueError(
            f"{op}: dropout_heads must hold the {num_heads} heads of q, got {first} … {last - 1} "
            f"of {shard.num_heads}, first_sequence {shard.first_sequence}"
        )


def check_dropout(op: str, p: float, seed: Tensor | None, device: torch.device) -> None:
    """Raise unless ``p`` is in ``[0, 1)`` and ``seed`` None or 0-d int64 on ``device``."""
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {p}")
    if seed is not None and (seed.dim(), seed.dtype, seed.device) != (0, torch.int64, device):
        raise ValueError(f"{op}: seed must be () torch.int64 {device}, got {describe(seed)}")
