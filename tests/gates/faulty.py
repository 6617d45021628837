"""Kernels that are wrong on purpose, and calls that launch them: the gates must refuse each."""

import torch
import triton
import triton.language as tl

from emu3_kernels.runtime.launch import Tile

TILE = Tile(block=64, num_warps=1)


@triton.jit
def _unmasked_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel)
    tl.store(y_ptr + i, x)


@triton.jit
def _overread_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x, mask=i < numel)


@triton.jit
def _racy_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Every program adds its block to the same totals, and none waits for another."""
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * BLOCK + c
    total = tl.load(y_ptr + c) + tl.load(x_ptr + i, mask=i < numel, other=0)
    tl.store(y_ptr + c, total)


def launch(name: str) -> torch.Tensor:
    """Run the kernel ``name`` over one block and a half of ones."""
    x = torch.ones(TILE.block * 3 // 2)
    y = torch.zeros_like(x)
    globals()[name][(2,)](x, y, x.numel(), **TILE.options())
    return y
