"""The compiled library: whether it is there, for which devices, at which CPU level."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from emu3_kernels import _C  # noqa: F401  (loading it registers torch.ops.emu3_kernels)

    MISSING = None
except ModuleNotFoundError:
    MISSING = "the native library was not built (no C++ compiler or no torch at installation)"

LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets, lowest first; a library for another processor holds ``base`` alone."""

DTYPES = (torch.float32, torch.bfloat16)


def cpu_level() -> str:
    """Name the instruction-set level in force."""
    return LEVELS[torch.ops.emu3_kernels.cpu_level()]


def cpu_levels() -> tuple[str, ...]:
    """Name the levels that this processor and this library can run, lowest first."""
    if MISSING:
        return ()
    return LEVELS[: torch.ops.emu3_kernels.highest_cpu_level() + 1]


@contextmanager
def use_cpu_level(level: str) -> Iterator[None]:
    """Run the native kernels of ``level`` inside the block, in the whole process."""
    if level not in cpu_levels():
        raise ValueError(f"use_cpu_level: expected one of {', '.join(cpu_levels())}, got {level!r}")
    before = torch.ops.emu3_kernels.cpu_level()
    torch.ops.emu3_kernels.set_cpu_level(LEVELS.index(level))
    try:
        yield
    finally:
        torch.ops.emu3_kernels.set_cpu_level(before)


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Advise the kernel to back ``tensor``, contiguous and new, with pages of 2 MiB; return it.

    The first write to huge pages is four times as fast, and reads are faster. Without the native
    library, on a GPU or on another system than Linux, nothing happens.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"advise_huge_pages: expected a contiguous tensor, got {tensor.stride()}")
    if tensor.is_cpu and not MISSING:
        torch.ops.emu3_kernels.use_large_pages(tensor)
    return tensor


def why_not_cpu(tensor: Tensor) -> str | None:
    """Say why the CPU kernels cannot take ``tensor``; None if they can."""
    if tensor.is_cpu and tensor.dtype in DTYPES and not MISSING:
        return None
    if MISSING:
        return MISSING
    if not tensor.is_cpu:
        return f"no kernel for a {tensor.device.type} tensor"
    return f"{tensor.dtype} is left to the reference"


def why_not_alike(x: Tensor, *others: Tensor) -> str | None:
    """As :func:`why_not_cpu`, of kernels that take tensors of one dtype alone."""
    if odd := {other.dtype for other in others} - {x.dtype}:
        return f"{', '.join(map(str, odd))} beside an x of {x.dtype} is left to the reference"
    return why_not_cpu(x)
