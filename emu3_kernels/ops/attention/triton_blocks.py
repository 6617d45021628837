"""What the attention kernels in Triton share: heads of rows, and the blocks of key ranges.

Blocks of keys to which every query of a block attends are not masked; those at ragged ends are.
"""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges, QueryRanges
from emu3_kernels.runtime.dropout import drop_below, keep_scale
from emu3_kernels.runtime.launch import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


def padded(head_dim: int) -> int:
    """Return the channels of a block: a dot is at least 16 wide."""
    return max(next_power_of_2(head_dim), 16)


def range_arguments(
    ranges: KeyRanges | QueryRanges,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return ``first_ptr``, ``end_ptr``, the stride of the batch (0 if shared) and the offset."""
    first, end, offset, *_ = ranges
    if first is None or first.shape[0] == 1:
        return first, end, 0, offset
    return first, end, first.stride(0), offset


def dropout_arguments(
    dropout: Dropout | None, q: Tensor
) -> tuple[Tensor | int | float | None, ...]:
    """Return the seed, positions, numbering of heads, smallest kept word and factor."""
    if dropout is None:
        return None, None, None, None, None, 0, 1.0
    p, seed, q_positions, k_positions, _ = dropout
    numbering = dropout.numbering(q)
    return seed, q_positions, k_positions, *numbering, drop_below(p), keep_scale(p)


@triton.jit
def program_ids(num_blocks, num_heads, num_kv_heads):
    """Return the batch, KV head, head and block of queries of a program.

    Heads that share keys are neighbours. The last block, which may have the most keys, is first.
    """
    program = tl.program_id(0)
    heads_per_kv_head = num_heads // num_kv_heads
    head, program = program % heads_per_kv_head, program // heads_per_kv_head
    block, program = num_blocks - 1 - program % num_blocks, program // num_blocks
    kv_head, batch = (program % num_kv_heads).to(tl.int64), (program // num_kv_heads).to(tl.int64)
    return batch, kv_head, kv_head * heads_per_kv_head + head, block


@triton.jit
def load_rows(ptr, row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the head of every row; rows are not masked, so each must exist."""
    c = tl.arange(0, BLOCK_D)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + c[None, :]
    if HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(c < HEAD_DIM)[None, :], other=0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, row, stride, value, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    c = tl.arange(0, BLOCK_D)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + c[None, :]
    inside = inside[:, None] & (c < HEAD_DIM)[None, :] if HEAD_DIM < BLOCK_D else inside[:, None]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def clip(i, end):
    return tl.minimum(tl.maximum(i, 0), end)


@triton.jit
def keys_of_block(
    first_ptr, end_ptr, offset, low, num_queries, num_keys, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Return the range of keys to which any query of a block attends, and that of all of them."""
    high = tl.minimum(low + BLOCK_M, num_queries) - 1
    if first_ptr is None:
        return 0, clip(high + offset, num_keys), 0, clip(low + offset, num_keys)
    else:  # noqa: RET505 (Triton compiles what follows a branch that returns)
        return (
            tl.load(first_ptr + low), tl.load(end_ptr + high),
            tl.load(first_ptr + high), tl.load(end_ptr + low),
        )  # fmt: skip


@triton.jit
def load_key_range(first_ptr, end_ptr, offset, i, num_keys):
    """Return the first key to which each of the queries attends, and the number of its keys."""
    if first_ptr is None:
        return tl.zeros_like(i), clip(i + offset, num_keys)
    else:  # noqa: RET505
        first = tl.load(first_ptr + i)
        return first, tl.maximum(tl.load(end_ptr + i) - first, 0)


@triton.jit
def load_position(positions_ptr, i, offset):
    """Load the position of a token of a shard; in the whole sequence it is ``i + offset``."""
    if positions_ptr is None:
        return i + offset
    else:  # noqa: RET505
        return tl.load(positions_ptr + i)


@triton.jit
def is_visible(j, first, length):
    """``first <= j < first + length`` in one comparison: masks are what spills on gfx942."""
    return (j - first).to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def dot(a, b):
    """``a @ b`` in float32, of float32 inputs too."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_acc(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")
