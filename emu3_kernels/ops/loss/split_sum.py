"""A float32 sum of GEMMs in the memory of its 16-bit result and as much again."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.gemm import mm_


class SplitSum:
    """Accumulates GEMMs in float32, some rows of ``out`` at a time, and rounds the last sum once.

    Until then the upper 16 bits of a sum are stored in ``out``, where its rounded value will be,
    and the lower 16 bits in a second tensor.
    """

    def __init__(self, out: Tensor, max_rows: int) -> None:
        self.out, self.upper = out, out.view(torch.int16)
        self.lower = torch.empty_like(self.upper)
        self.sums = out.new_empty((max_rows, out.shape[1]), dtype=torch.float32)
        self.join, self.split = _join, _split
        if out.is_cpu and out.is_contiguous() and not library.MISSING:
            ops = torch.ops.emu3_kernels
            self.join, self.split = ops.join_halves, ops.split_halves

    def add_(self, rows: slice, a: Tensor, b: Tensor, *, first: bool, last: bool) -> None:
        """Add ``a @ b`` to ``rows``; the ``first`` GEMM of a row begins its sum."""
        sums = self.sums[: rows.stop - rows.start]
        halves = self.upper[rows], self.lower[rows], sums
        if not first:
            self.join(*halves)
        mm_(sums, a, b, add=not first)
        if last:
            self.out[rows].copy_(sums)
        else:
            self.split(*halves)


def _join(upper: Tensor, lower: Tensor, sums: Tensor) -> None:
    for half, number in zip((lower, upper), _halves(sums), strict=True):
        number.copy_(half)


def _split(upper: Tensor, lower: Tensor, sums: Tensor) -> None:
    for half, number in zip((lower, upper), _halves(sums), strict=True):
        half.copy_(number)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Return the lower and the upper bits of float32 numbers, as views (little-endian)."""
    return x.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
