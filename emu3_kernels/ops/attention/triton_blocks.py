"""What the attention kernels in Triton share: tiles, rows of heads, and spans cut into blocks.

The blocks of a span that are wholly visible are not masked; those at its ragged ends are.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.attention.spans import Dropout, Spans
from emu3_kernels.runtime.launch import next_power_of_2, why_not_triton

WIDEST = 128
"""Channels of a head that the tiles are made for."""

LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How many queries and keys a program holds at once, its warps, and the blocks under way."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "STAGES": self.num_stages,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def why_not(q: Tensor) -> str | None:
    """Say why the kernels cannot take heads such as those of ``q``; None if they can."""
    if q.shape[-1] > WIDEST:
        return f"the kernels take heads of {WIDEST} at most, got {q.shape[-1]}"
    return why_not_triton(q)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def heads(q: Tensor, k: Tensor) -> dict[str, int]:
    """Return the numbers of a kernel that are the same for every program."""
    width = q.shape[3]
    return {
        "num_queries": q.shape[1],
        "num_heads": q.shape[2],
        "num_groups": k.shape[2],
        "WIDTH": width,
        # A product is at least 16 wide.
        "HEAD": max(next_power_of_2(width), 16),
    }


def span_stride(spans: Spans) -> int:
    """Return the stride of the batch: 0 where one row serves all."""
    return 0 if spans.first.shape[0] == 1 else spans.first.stride(0)


def drops(dropout: Dropout | None) -> tuple[Tensor | int | float | None, ...]:
    """Return what a kernel asks of dropout: seed, rows, columns, smallest word kept, factor."""
    if dropout is None:
        return None, None, None, 0, 1.0
    word, factor = dropout.drop_below(dropout.p), dropout.keep_scale(dropout.p)
    return dropout.seed, dropout.rows, dropout.columns, word, factor


@triton.jit
def place(num_blocks, num_heads, num_groups):
    """Return the batch, group, head and block of queries of a program.

    Heads that share keys run side by side; the last block, which may see the most keys, is first.
    """
    program = tl.program_id(0)
    members = num_heads // num_groups
    member, program = program % members, program // members
    block, program = num_blocks - 1 - program % num_blocks, program // num_blocks
    group, batch = (program % num_groups).to(tl.int64), (program // num_groups).to(tl.int64)
    return batch, group, group * members + member, block


@triton.jit
def load_rows(ptr, row, stride, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Load the head of every row; there is no mask on rows, so each must exist."""
    c = tl.arange(0, HEAD)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + c[None, :]
    if WIDTH < HEAD:
        return tl.load(ptrs, mask=(c < WIDTH)[None, :], other=0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, row, stride, value, inside, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    c = tl.arange(0, HEAD)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + c[None, :]
    inside = inside[:, None] & (c < WIDTH)[None, :] if WIDTH < HEAD else inside[:, None]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def keys_of(first_ptr, end_ptr, low, num_queries, QUERIES: tl.constexpr):
    """Return the first key that a block of queries sees, the one after the last, and the same two
    for those that all of its queries see.
    """
    high = tl.minimum(low + QUERIES, num_queries) - 1
    return (
        tl.load(first_ptr + low), tl.load(end_ptr + high),
        tl.load(first_ptr + high), tl.load(end_ptr + low),
    )  # fmt: skip


@triton.jit
def load_spans(first_ptr, end_ptr, i):
    """Return the first key that each of the queries sees, and how many it sees."""
    first = tl.load(first_ptr + i)
    return first, tl.maximum(tl.load(end_ptr + i) - first, 0)


@triton.jit
def sees(j, first, length):
    """``first <= j < first + length`` in one comparison: masks are what spills on gfx942."""
    return (j - first).to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def product(a, b):
    """``a @ b`` in float32, of float32 factors too."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_product(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")
