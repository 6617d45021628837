"""decode_attention in Triton: keys split among programs, and a second launch that merges.

B batch, t new tokens, H query heads, G key heads, K head width. The ``t * H / G`` queries of a key
head are the rows of one product, by token, then by head: each key is read once for all of them.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime import launch
from emu3_kernels.runtime.launch import (
    NUM_MULTIPROCESSORS,
    Config,
    Contract,
    meta,
    next_power_of_2,
    why_not_triton,
)

FEWEST_ROWS, MOST_ROWS = 16, 64
"""Of a product: what tensor cores take at the least; accumulators that fit the registers."""
MOST_SPLITS = 64
"""Partial results that one program of the second launch holds."""
PROGRAMS_OF_MULTIPROCESSOR = 4
NUM_WARPS = 4


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "a cache without unit stride in K is left to the reference"
    return why_not_triton(q)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    scale: float,
) -> Tensor:
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    (batch, new, heads, width), groups = q.shape, k_cache.shape[2]
    table = None if page_table is None else page_table.contiguous()
    page = 0 if table is None else k_cache.shape[1]
    rows = new * heads // groups
    tile_rows = min(max(next_power_of_2(rows), FEWEST_ROWS), MOST_ROWS)
    blocks = triton.cdiv(rows, tile_rows)
    # Of gfx942's 64 KiB of shared memory, more keys leave too little, and registers spill.
    keys = 64 if q.element_size() == 2 and launch.WARP == 32 else 32
    capacity = k_cache.shape[1] if table is None else page * table.shape[1]
    splits = num_splits(batch * groups * blocks, triton.cdiv(capacity, keys))
    partial = q.new_empty(batch, groups, splits, rows, width, dtype=torch.float32)
    lse = q.new_empty(batch, groups, splits, rows, dtype=torch.float32)
    padded = max(next_power_of_2(width), 16)
    _fwd_kernel[(splits, groups * blocks, batch)](
        q, k_cache, v_cache, lengths, table, partial, lse,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        0 if table is None else table.stride(0), lengths.stride(0),
        scale * math.log2(math.e), new, heads // groups, splits, blocks,
        PAGE=page, ROWS=tile_rows, KEYS=keys, K=width, PADDED=padded,
        num_stages=3 if launch.WARP == 32 else 1, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    _merge_kernel[(rows, groups, batch)](
        partial, lse, lengths, out, lengths.stride(0), new, heads // groups, splits,
        KEYS=keys, SPLITS=next_power_of_2(splits), K=width, PADDED=padded,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def num_splits(programs: int, blocks_of_keys: int) -> int:
    """Say into how many runs the keys of a row are cut, so that they fill the machine.

    By shapes alone: lengths would have to come from the GPU, where each program divides them.
    """
    wanted = triton.cdiv(PROGRAMS_OF_MULTIPROCESSOR * NUM_MULTIPROCESSORS, programs)
    return max(1, min(wanted, MOST_SPLITS, blocks_of_keys))


@triton.jit
def _share(length, splits, KEYS: tl.constexpr):
    """Keys of one run: whole blocks, so that only the last is ragged."""
    return tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, partial_ptr, lse_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_row_stride, k_key_stride, k_head_stride,
    v_row_stride, v_key_stride, v_head_stride, table_stride, lengths_stride,
    scale, new, heads, splits, blocks,
    PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, K: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """partial = softmax(scale * q @ k.T) @ v over a run of keys, lse = log2 of its denominator."""
    split = tl.program_id(0)
    group = (tl.program_id(1) // blocks).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + batch * lengths_stride)
    share = _share(length, splits, KEYS)
    start = split * share
    end = tl.minimum(start + share, length)
    if start >= end:
        return
    row = (tl.program_id(1) % blocks) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, group * heads + row % heads
    c = tl.arange(0, PADDED)
    here = (row < new * heads)[:, None] & (c < K)[None, :]
    q_ptr += batch * q_batch_stride + token[:, None].to(tl.int64) * q_token_stride
    q = tl.load(q_ptr + head[:, None] * q_head_stride + c[None, :], mask=here, other=0)
    sees = tl.minimum(length - new + 1 + token, end)
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    k_ptr += group * k_head_stride
    v_ptr += group * v_head_stride
    for first in range(start, end, KEYS):
        key = first + tl.arange(0, KEYS)
        inside = key < end
        if PAGE:
            page = tl.load(table_ptr + batch * table_stride + key // PAGE, mask=inside, other=0)
            at, key_at = page.to(tl.int64), key % PAGE
        else:
            at, key_at = batch, key
        k_at = at * k_row_stride + key_at.to(tl.int64) * k_key_stride
        v_at = at * v_row_stride + key_at.to(tl.int64) * v_key_stride
        k_mask = inside[None, :] & (c < K)[:, None]
        k = tl.load(k_ptr + k_at[None, :] + c[:, None], mask=k_mask, other=0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(key[None, :] < sees[:, None], scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, axis=1))
        # A row that has seen nothing would subtract infinity from itself.
        subtract = tl.where(higher == float("-inf"), 0, higher)
        weights = tl.exp2(scores - subtract[:, None])
        factor = tl.exp2(greatest - subtract)
        denominator = denominator * factor + tl.sum(weights, axis=1)
        v_mask = inside[:, None] & (c < K)[None, :]
        v = tl.load(v_ptr + v_at[:, None] + c[None, :], mask=v_mask, other=0)
        total = tl.dot(weights.to(v.dtype), v, total * factor[:, None], input_precision="ieee")
        greatest = higher
    total = total * tl.where(denominator == 0, 0, 1 / denominator)[:, None]
    first_row = ((batch * tl.num_programs(1) // blocks + group) * splits + split) * (new * heads)
    place = first_row + row
    tl.store(partial_ptr + place[:, None] * K + c[None, :], total, mask=here)
    tl.store(lse_ptr + place, greatest + tl.log2(denominator), mask=row < new * heads)


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, lengths_ptr, out_ptr, lengths_stride, new, heads, splits,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) * partial_s over the runs that have keys."""
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group, groups = tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths_ptr + batch * lengths_stride)
    s = tl.arange(0, SPLITS)
    c = tl.arange(0, PADDED)
    has_keys = (s < splits) & (s * _share(length, splits, KEYS) < length)
    place = ((batch * groups + group) * splits + s) * (new * heads) + row
    lse = tl.load(lse_ptr + place, mask=has_keys, other=float("-inf"))
    greatest = tl.max(lse, axis=0)
    factor = tl.exp2(lse - tl.where(greatest == float("-inf"), 0, greatest))
    denominator = tl.sum(factor, axis=0)
    mask = has_keys[:, None] & (c < K)[None, :]
    partial = tl.load(partial_ptr + place[:, None] * K + c[None, :], mask=mask, other=0)
    total = tl.sum(partial * factor[:, None], axis=0)
    out = total * tl.where(denominator == 0, 0, 1 / denominator)
    place = (batch * new + row // heads) * groups * heads + group * heads + row % heads
    tl.store(out_ptr + place * K + c, out.to(out_ptr.dtype.element_ty), mask=c < K)


def _cache(new: int, page: int | None) -> None:
    """Emu3-8B, two rows of 8,192 positions."""
    shape = (2, 8192, 8, 128) if page is None else (2 * 8192 // page, page, 8, 128)
    table = None if page is None else meta(2, 8192 // page, dtype=torch.int32)
    lengths = meta(2, dtype=torch.int32)
    forward(meta(2, new, 32, 128), meta(*shape), meta(*shape), lengths, table, 128**-0.5)


EXCEPTIONS = {"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"}
# 128 registers keep four programs of four warps on a multiprocessor, 255 two. Narrow are the
# length, the pages of the keys that a thread reads, and the lse of a row.
STATIC = Contract(
    128, scalar_loads=1, scalar_stores=1, tensor_cores=True, async_copies=True,
    exceptions=EXCEPTIONS,
)  # fmt: skip
MANY = replace(STATIC, max_registers=255)
PAGED = replace(STATIC, scalar_loads=8)
MERGE = Contract(64, scalar_loads=4, scalar_stores=1)
CONFIGS = (
    Config("one token", lambda: _cache(1, None), {"_fwd_kernel": STATIC, "_merge_kernel": MERGE}),
    Config("16 tokens", lambda: _cache(16, None), {"_fwd_kernel": MANY, "_merge_kernel": MERGE}),
    Config(
        "one token, pages of 16",
        lambda: _cache(1, 16),
        {"_fwd_kernel": PAGED, "_merge_kernel": MERGE},
    ),
)
