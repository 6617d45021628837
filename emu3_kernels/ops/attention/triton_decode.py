"""decode_attention in Triton: keys are split among programs, and a second launch merges them.

B batch, t new tokens, H query heads, KV key/value heads, K head_dim. The ``t * H / KV`` queries of
a KV head are the rows of one dot, by token, then by head: each key is read once for all of them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import (
    cdiv,
    gpu_of,
    launch,
    next_power_of_2,
    tile,
    why_not_triton,
)

LOG2E = math.log2(math.e)
MIN_ROWS, MAX_ROWS = 16, 64
"""Of a dot: the fewest that tensor cores take; the most whose accumulators fit the registers."""
MAX_SPLITS = 64
"""Partial results that one program of the second launch holds."""
PROGRAMS_PER_SM = 4
# Of gfx942's 64 KiB of shared memory, more keys leave too little, and registers spill.
TILE = tile(4, 3, BLOCK_N=64)
TILE_FLOAT32 = tile(4, 3, BLOCK_N=32)
TILE_WARP64 = tile(4, 1, BLOCK_N=32)
MERGE_TILE = tile(4)


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "a cache without unit stride in K is left to the reference"
    return why_not_triton(q)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    page_table: Tensor | None,
) -> Tensor:
    if q.stride(3) != 1:
        q = q.contiguous()
    (batch, num_new, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k_cache.shape
    out = q.new_empty((batch, num_new, num_heads, head_dim))
    if batch * num_heads * head_dim == 0:
        return out
    page, table_stride = 0, 0
    if page_table is not None:
        page_table = page_table.contiguous()
        page, table_stride = num_keys, page_table.stride(0)
        num_keys *= page_table.shape[1]
    heads_per_kv_head = num_heads // num_kv_heads
    rows = num_new * heads_per_kv_head
    tile_rows = min(max(next_power_of_2(rows), MIN_ROWS), MAX_ROWS)
    blocks = cdiv(rows, tile_rows)
    gpu = gpu_of(q)
    chosen = TILE_WARP64 if gpu.warp_size == 64 else TILE if q.itemsize == 2 else TILE_FLOAT32
    block_n, programs = chosen["BLOCK_N"], batch * num_kv_heads * blocks
    splits = num_splits(programs, cdiv(num_keys, block_n), gpu.num_sms)
    partial = q.new_empty((batch, num_kv_heads, splits, rows, head_dim), dtype=torch.float32)
    lse = q.new_empty((batch, num_kv_heads, splits, rows), dtype=torch.float32)
    block_d, lengths_stride = max(next_power_of_2(head_dim), 16), lengths.stride(0)
    launch(
        decode_attention_split_kernel, (splits, num_kv_heads * blocks, batch),
        q, k_cache, v_cache, lengths, page_table, partial, lse,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        table_stride, lengths_stride,
        scale * LOG2E, num_new, heads_per_kv_head, splits, blocks,
        PAGE=page, BLOCK_M=tile_rows, HEAD_DIM=head_dim, BLOCK_D=block_d, **chosen,
    )  # fmt: skip
    launch(
        decode_attention_merge_kernel, (rows, num_kv_heads, batch),
        partial, lse, lengths, out, lengths_stride, num_new, heads_per_kv_head, splits,
        BLOCK_N=block_n, BLOCK_S=next_power_of_2(splits), HEAD_DIM=head_dim, BLOCK_D=block_d,
        **MERGE_TILE,
    )  # fmt: skip
    return out


def num_splits(programs: int, key_blocks: int, num_sms: int) -> int:
    """Return the number of splits of the keys of a row that fills the machine.

    By shapes alone: lengths are known to the GPU only, where each program divides them.
    """
    wanted = cdiv(PROGRAMS_PER_SM * num_sms, programs)
    return max(1, min(wanted, MAX_SPLITS, key_blocks))


@triton.jit
def keys_per_split(length, splits, BLOCK_N: tl.constexpr):
    """Keys of a split: whole blocks, so that only the last is ragged."""
    return tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N


@triton.jit
def decode_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, partial_ptr, lse_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_row_stride, k_key_stride, k_head_stride,
    v_row_stride, v_key_stride, v_head_stride, table_stride, lengths_stride,
    scale, num_new, heads_per_kv_head, splits, blocks,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial = softmax(scale * q @ k.T) @ v over a split of keys; lse = log2(denominator)."""
    split = tl.program_id(0)
    kv_head = (tl.program_id(1) // blocks).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + batch * lengths_stride)
    num_keys = keys_per_split(length, splits, BLOCK_N)
    start = split * num_keys
    end = tl.minimum(start + num_keys, length)
    if start >= end:
        return
    row = (tl.program_id(1) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // heads_per_kv_head, kv_head * heads_per_kv_head + row % heads_per_kv_head
    c = tl.arange(0, BLOCK_D)
    inside = (row < num_new * heads_per_kv_head)[:, None] & (c < HEAD_DIM)[None, :]
    q_ptr += batch * q_batch_stride + token[:, None].to(tl.int64) * q_token_stride
    q = tl.load(q_ptr + head[:, None] * q_head_stride + c[None, :], mask=inside, other=0)
    end_of_row = tl.minimum(length - num_new + 1 + token, end)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        exists = key < end
        if PAGE:
            page = tl.load(table_ptr + batch * table_stride + key // PAGE, mask=exists, other=0)
            cache_row, cache_key = page.to(tl.int64), key % PAGE
        else:
            cache_row, cache_key = batch, key
        k_offset = cache_row * k_row_stride + cache_key.to(tl.int64) * k_key_stride
        v_offset = cache_row * v_row_stride + cache_key.to(tl.int64) * v_key_stride
        k_mask = exists[None, :] & (c < HEAD_DIM)[:, None]
        k = tl.load(k_ptr + k_offset[None, :] + c[:, None], mask=k_mask, other=0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(key[None, :] < end_of_row[:, None], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        # A row without a key so far would subtract infinity from itself.
        finite_m = tl.where(m_new == float("-inf"), 0, m_new)
        p = tl.exp2(scores - finite_m[:, None])
        alpha = tl.exp2(m_i - finite_m)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        v_mask = exists[:, None] & (c < HEAD_DIM)[None, :]
        v = tl.load(v_ptr + v_offset[:, None] + c[None, :], mask=v_mask, other=0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    acc = acc * tl.where(l_i == 0, 0, 1 / l_i)[:, None]
    rows = num_new * heads_per_kv_head
    num_kv_heads = tl.num_programs(1) // blocks
    index = ((batch * num_kv_heads + kv_head) * splits + split) * rows + row
    tl.store(partial_ptr + index[:, None] * HEAD_DIM + c[None, :], acc, mask=inside)
    tl.store(lse_ptr + index, m_i + tl.log2(l_i), mask=row < rows)


@triton.jit
def decode_attention_merge_kernel(
    partial_ptr, lse_ptr, lengths_ptr, out_ptr, lengths_stride, num_new, heads_per_kv_head, splits,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) * partial_s over the splits that have keys."""
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths_ptr + batch * lengths_stride)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_D)
    has_keys = (s < splits) & (s * keys_per_split(length, splits, BLOCK_N) < length)
    index = ((batch * num_kv_heads + kv_head) * splits + s) * (num_new * heads_per_kv_head) + row
    lse = tl.load(lse_ptr + index, mask=has_keys, other=float("-inf"))
    m = tl.max(lse, axis=0)
    alpha = tl.exp2(lse - tl.where(m == float("-inf"), 0, m))
    denominator = tl.sum(alpha, axis=0)
    mask = has_keys[:, None] & (c < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + index[:, None] * HEAD_DIM + c[None, :], mask=mask, other=0)
    acc = tl.sum(partial * alpha[:, None], axis=0)
    out = acc * tl.where(denominator == 0, 0, 1 / denominator)
    token, head = row // heads_per_kv_head, kv_head * heads_per_kv_head + row % heads_per_kv_head
    index = (batch * num_new + token) * num_kv_heads * heads_per_kv_head + head
    tl.store(out_ptr + index * HEAD_DIM + c, out.to(out_ptr.dtype.element_ty), mask=c < HEAD_DIM)
