"""Kernels that are wrong on purpose, and calls that launch them: the gates must refuse each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import cdiv, launch, tile

BLOCK = 64


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel)
    tl.store(y_ptr + i, x)


@triton.jit
def overread_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x, mask=i < numel)


@triton.jit
def racy_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Every program adds its block to the same totals, without an atomic."""
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * BLOCK + c
    total = tl.load(y_ptr + c) + tl.load(x_ptr + i, mask=i < numel, other=0)
    tl.store(y_ptr + c, total)


@triton.jit
def last_sums_kernel(
    x_ptr, y_ptr, numel, BLOCK: tl.constexpr, SEM: tl.constexpr, COUNTED: tl.constexpr
):
    """Both programs store a block, and the last adds them; y starts with their counter.

    Right if ``SEM`` is "acq_rel" and the last is the one that counts last (``COUNTED``).
    """
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + c
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i, mask=i < numel, other=0))
    tl.debug_barrier()
    before = tl.atomic_add(y_ptr, 1, sem=SEM)
    is_last = before == 1 if COUNTED else tl.program_id(0) == 1
    if is_last:
        total = tl.load(y_ptr + BLOCK + c) + tl.load(y_ptr + 2 * BLOCK + c)
        tl.store(y_ptr + 3 * BLOCK + c, total)


def run(name: str, **constants: object) -> Tensor:
    """Run the kernel ``name`` over one block and a half of ones."""
    x = torch.ones(BLOCK * 3 // 2)
    y = torch.zeros(4 * BLOCK if constants else x.numel())
    launch(globals()[name], (2,), x, y, x.numel(), **tile(1, BLOCK=BLOCK), **constants)
    return y


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, row_stride, width, BLOCK: tl.constexpr):
    """Right, and as wide as the alignment of a row allows."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + column, mask=column < width)
    tl.store(y_ptr + row * row_stride + column, x, mask=column < width)


def copy_rows(x: Tensor, num_warps: int = 4, **options: bool) -> None:
    rows, width = x.shape
    settings = tile(num_warps, BLOCK=1024) | options
    launch(copy_rows_kernel, (rows,), x, x, x.stride(0), width, **settings)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """A thread keeps 512 elements of a row until their sum is known."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < width, other=0).to(tl.float32)
    tl.store(y_ptr + column, x - tl.sum(x, axis=0), mask=column < width)


def spill(x: Tensor) -> None:
    launch(spilling_kernel, (1,), x, x, x.numel(), **tile(1, BLOCK=16384))


@triton.jit
def hoarding_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Copies rows of two matrices to shared memory, STAGES ahead."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(0, rows, num_stages=STAGES):
        x = tl.load(x_ptr + row * BLOCK + column)
        y = tl.load(y_ptr + row * BLOCK + column)
        total += x * y
    tl.store(y_ptr + column, total)


def hoard(x: Tensor, y: Tensor) -> None:
    """Six rows of 8,192 float32 ahead, twice, are 320 KiB."""
    rows, width = x.shape
    launch(hoarding_kernel, (cdiv(rows, 6),), x, y, rows, **tile(16, BLOCK=width, STAGES=6))


@triton.jit
def serialised_kernel(x_ptr, y_ptr, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A branch between two dots ends the basic block in which wgmma may overlap."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    first = tl.program_id(0).to(tl.int64) * ROWS
    keys = tl.load(x_ptr + (first + row)[:, None] * WIDTH + column[None, :])
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, rows, ROWS, num_stages=2):
        queries = tl.load(x_ptr + (start + row)[:, None] * WIDTH + column[None, :])
        p = tl.exp2(tl.dot(keys, queries.T))
        if start < first:
            p = tl.where(row[:, None] <= row[None, :], p, 0)
        dp = tl.dot(keys, queries.T)
        total = tl.dot((p * dp).to(queries.dtype), queries, total)
    total = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (first + row)[:, None] * WIDTH + column[None, :], total)


def serialise(x: Tensor) -> None:
    rows, width = x.shape
    options = tile(8, 2, ROWS=64, WIDTH=width)
    launch(serialised_kernel, (cdiv(rows, 64),), x, x, rows, **options)


@triton.jit
def newer_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """``tl.to_tensor`` is new in Triton 3.7."""
    column = tl.arange(0, BLOCK)
    inside = column < tl.to_tensor(width)
    tl.store(y_ptr + column, tl.load(x_ptr + column, mask=inside), mask=inside)


def call_newer(x: Tensor) -> None:
    launch(newer_kernel, (1,), x, x, x.numel(), **tile(4, BLOCK=1024))
