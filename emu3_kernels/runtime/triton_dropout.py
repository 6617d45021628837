"""Counter-based dropout in Triton: the same random words as the definition, ``dropout.py``."""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.dropout import drop_below, keep_scale


def arguments(p: float, seed: Tensor | None) -> tuple[Tensor | None, int | None, float | None]:
    """Return ``seed_ptr``, ``drop_below`` and ``scale`` of a launch: None each without a seed."""
    return (None, None, None) if seed is None else (seed, drop_below(p), keep_scale(p))


@triton.jit
def keep(seed, drop_below, row, column, head):
    """Return which elements are kept; ``row``, ``column`` and ``head`` broadcast.

    Four adjacent columns of a thread share one Philox: the compiler merges its calls if the first
    column is known to be a multiple of 4.
    """
    row, column, head = (
        tl.cast(row, tl.uint32),
        tl.cast(column, tl.uint32),
        tl.cast(head, tl.uint32),
    )
    w0, w1, w2, w3 = tl.philox(seed, column >> 2, row, head, head * 0)
    word = tl.where(
        column & 2 == 0, tl.where(column & 1 == 0, w0, w1), tl.where(column & 1 == 0, w2, w3)
    )
    return word >= tl.cast(drop_below, tl.uint32)
