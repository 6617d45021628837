"""A kernel that writes which elements ``triton_dropout.py`` keeps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime import dropout, triton_dropout
from tests.gates.emulated import emulated


@triton.jit
def keep_kernel(seed_ptr, kept_ptr, width, drop_below, first_column, head, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    keep = triton_dropout.keep(tl.load(seed_ptr), drop_below, row, first_column + c, head)
    tl.store(kept_ptr + row * width + c, keep, mask=c < width)


def kept(seed: Tensor, p: float, shape: tuple[int, int], first_column: int, head: int) -> Tensor:
    """Launch the kernel over rows of ``shape``, whose columns start at ``first_column``."""
    result = torch.zeros(shape, dtype=torch.bool)
    block = triton.next_power_of_2(shape[1])
    scalars = shape[1], dropout.drop_below(p), first_column, head
    keep_kernel[(shape[0],)](seed, result, *scalars, BLOCK=block, enable_fp_fusion=True)
    return result


def kept_emulated(*args: object) -> Tensor:
    with emulated():
        return kept(*args)


def num_multiplies() -> int:
    """Count the multiply-high instructions of a thread with eight columns."""
    types = dict.fromkeys(("width", "drop_below", "first_column", "head"), "i32")
    source = triton.compiler.ASTSource(
        keep_kernel,
        {"seed_ptr": "*i64", "kept_ptr": "*i1", **types, "BLOCK": "constexpr"},
        {"BLOCK": 1024, "first_column": 0},
        {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]
    return ptx.count("mul.hi.u32")
