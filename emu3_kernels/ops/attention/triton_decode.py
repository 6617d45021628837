"""decode_attention in Triton: keys are split among programs, and the last of them merges.

B batch, t new tokens, H query heads, KV key/value heads, K head_dim. The ``t * H / KV`` queries of
a KV head are the rows of a dot, by token, then by head: each key is read once for all of them, or
for 128 of them. Every program stores its partial result, then counts itself; the one that counts
last merges all, in their order, so that the result does not depend on which one it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.counters import counters
from emu3_kernels.runtime.launch import (
    Gpu,
    cdiv,
    gpu_of,
    launch,
    next_power_of_2,
    planned,
    tile,
    why_not_triton,
)

LOG2E = 1.4426950408889634
MIN_ROWS, MAX_ROWS, MAX_ROWS_FLOAT32 = 16, 128, 64
"""Of a dot: the fewest that tensor cores take; the most whose accumulators fit the registers."""
MAX_SPLITS = 64
"""Partial results of a query that are merged at once."""
MERGED = 8192
"""Elements of partial results that 128 threads merge at once."""
# Of gfx942's 64 KiB of shared memory, more keys leave too little, and registers spill.
TILE = tile(4, 3, BLOCK_N=64)
TILE_TALL = tile(8, 3, BLOCK_N=64)
TILE_FLOAT32 = tile(4, 3, BLOCK_N=32)
TILE_WARP64 = tile(4, 1, BLOCK_N=32)
WARPS_PER_SM = 8
"""What an H200 was measured fastest with: 131,072 tokens in 153 us, with 16 in 159 to 179."""


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
    mask: Tensor | None,
    scale: float,
    page_table: Tensor | None,
) -> Tensor:
    q_strides = q.stride()
    if q_strides[3] != 1:
        q = q.contiguous()
        q_strides = q.stride()
    (batch, num_new, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k_cache.shape
    out = q.new_empty(batch, num_new, num_heads, head_dim)
    if batch * num_heads * head_dim == 0:
        return out
    page, table_stride = 0, 0
    if page_table is not None:
        page_table = page_table.contiguous()
        page, table_stride = num_keys, page_table.shape[1]
        num_keys *= table_stride
    heads_per_kv_head = num_heads // num_kv_heads
    rows = num_new * heads_per_kv_head
    splits, blocks, options = plan(
        batch * num_kv_heads, rows, num_keys, head_dim, q.itemsize, gpu_of(q)
    )
    results = batch * num_kv_heads * splits * rows
    partial = q.new_empty(results * (head_dim + 1), dtype=torch.float32)
    launch(
        decode_attention_kernel, (splits, num_kv_heads * blocks, batch),
        q, k_cache, v_cache, lengths.contiguous(), page_table,
        None if mask is None else mask.contiguous(), partial,
        counters(q, batch * num_kv_heads * blocks), out,
        *q_strides[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], table_stride,
        scale * LOG2E, num_new, heads_per_kv_head, splits, blocks,
        PAGE=page, HEAD_DIM=head_dim, **options,
    )  # fmt: skip
    return out


@planned
def plan(
    sequences: int, rows: int, num_keys: int, head_dim: int, itemsize: int, gpu: Gpu
) -> tuple[int, int, dict[str, int | bool]]:
    """Return the splits of the keys, the blocks of the rows and the options of a launch."""
    block_m, chosen = tile_of(rows, itemsize, gpu.warp_size)
    blocks, num_warps = cdiv(rows, block_m), chosen["num_warps"]
    resident = gpu.num_sms * WARPS_PER_SM // num_warps
    splits = num_splits(sequences * blocks, resident, cdiv(num_keys, chosen["BLOCK_N"]))
    block_d, block_s = max(next_power_of_2(head_dim), 16), next_power_of_2(splits)
    merged = MERGED * num_warps // (4 * block_s * block_d)
    blocks_of = {"BLOCK_M": block_m, "BLOCK_D": block_d, "BLOCK_S": block_s}
    return splits, blocks, chosen | blocks_of | {"MERGED_ROWS": min(max(merged, 1), block_m)}


def tile_of(rows: int, itemsize: int, warp_size: int) -> tuple[int, dict[str, int | bool]]:
    """Return the rows of a dot and the other options of a launch."""
    most = MAX_ROWS if itemsize == 2 else MAX_ROWS_FLOAT32
    block_m = min(max(next_power_of_2(rows), MIN_ROWS), most)
    if warp_size == 64:
        return block_m, TILE_WARP64
    if itemsize != 2:
        return block_m, TILE_FLOAT32
    return block_m, TILE_TALL if block_m == MAX_ROWS else TILE


def num_splits(programs: int, resident: int, key_blocks: int) -> int:
    """Return the most splits of the keys of a row whose programs are all resident at once.

    Or the power of two that is at most a sixteenth below, since one is merged without padding. By
    shapes alone: lengths are known to the GPU only, where each program divides them.
    """
    splits = max(1, min(resident // programs, MAX_SPLITS, key_blocks))
    power = 1 << splits.bit_length() - 1
    return power if 16 * (splits - power) <= splits else splits


@triton.jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, mask_ptr, partial_ptr, counters_ptr, out_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_row_stride, k_key_stride, k_head_stride,
    v_row_stride, v_key_stride, v_head_stride, table_stride,
    scale, num_new, heads_per_kv_head, splits, blocks,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """partial = softmax(scale * q @ k.T) @ v over a split of keys; the last to finish merges all.

    Keys per split are whole blocks, so that only the last is ragged; splits beyond ``num_splits``
    have no key. lse is log2 of the denominator, behind the partial results of all splits.
    """
    split = tl.program_id(0)
    kv_head = (tl.program_id(1) // blocks).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1) // blocks
    rows = num_new * heads_per_kv_head
    length = tl.load(lengths_ptr + batch)
    num_keys = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    num_splits = tl.cdiv(length, tl.maximum(num_keys, 1))
    if split > 0 and split >= num_splits:
        return
    start = split * num_keys
    end = tl.minimum(start + num_keys, length)
    first_row = (tl.program_id(1) % blocks) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    token, head = row // heads_per_kv_head, kv_head * heads_per_kv_head + row % heads_per_kv_head
    c = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (c < HEAD_DIM)[None, :]
    q_ptr += batch * q_batch_stride + token[:, None].to(tl.int64) * q_token_stride
    q = tl.load(q_ptr + head[:, None] * q_head_stride + c[None, :], mask=inside, other=0)
    first_new = length - num_new
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
        if first + BLOCK_N > first_new:
            attended = attends(mask_ptr, batch * num_new, token, key - first_new, num_new)
            scores = tl.where(attended, scores, float("-inf"))
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
    results = tl.num_programs(2).to(tl.int64) * num_kv_heads * splits * rows
    first_result = (batch * num_kv_heads + kv_head) * splits * rows
    lse_ptr = partial_ptr + results * HEAD_DIM + first_result
    partial_ptr += first_result * HEAD_DIM
    index = split * rows + row
    tl.store(partial_ptr + index[:, None] * HEAD_DIM + c[None, :], acc, mask=inside)
    tl.store(lse_ptr + index, m_i + tl.log2(l_i), mask=row < rows)
    # The barrier puts the stores of all threads before the release of the one that counts, and
    # its acquire before the loads of all threads below.
    tl.debug_barrier()
    counters_ptr += tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    finished = tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu") + 1
    if finished < num_splits:
        return
    tl.debug_barrier()
    tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")
    out_ptr += (batch * num_new * num_kv_heads + kv_head) * heads_per_kv_head * HEAD_DIM
    for first_merged in range(first_row, tl.minimum(first_row + BLOCK_M, rows), MERGED_ROWS):
        merge_rows(
            partial_ptr, lse_ptr, out_ptr, first_merged + tl.arange(0, MERGED_ROWS), rows,
            num_splits, num_kv_heads, heads_per_kv_head, HEAD_DIM, BLOCK_D, BLOCK_S,
        )  # fmt: skip


@triton.jit
def attends(mask_ptr, first_word, token, new, num_new):
    """Whether each new token attends to each key; ``new`` is which new one it is, or negative."""
    if mask_ptr is None:
        attended = new[None, :] <= token[:, None]
    else:
        word = tl.load(mask_ptr + first_word + token, mask=token < num_new, other=0)
        bit = (word[:, None] >> tl.minimum(tl.maximum(new, 0), 63)[None, :]) & 1
        attended = (new < num_new)[None, :] & ((new < 0)[None, :] | (bit != 0))
    return attended


@triton.jit
def merge_rows(
    partial_ptr, lse_ptr, out_ptr, row, rows, num_splits, num_kv_heads, heads_per_kv_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) * partial_s over the splits, past the L1 cache."""
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    index = s[None, :] * rows + row[:, None]
    exists = (row < rows)[:, None] & (s < tl.maximum(num_splits, 1))[None, :]
    lse = tl.load(lse_ptr + index, mask=exists, other=float("-inf"), cache_modifier=".cg")
    m = tl.max(lse, axis=1)
    alpha = tl.exp2(lse - tl.where(m == float("-inf"), 0, m)[:, None])
    denominator = tl.sum(alpha, axis=1)
    mask = exists[:, :, None] & (c < HEAD_DIM)[None, None, :]
    partial_ptr += index[:, :, None] * HEAD_DIM + c[None, None, :]
    partial = tl.load(partial_ptr, mask=mask, other=0, cache_modifier=".cg")
    acc = tl.sum(partial * alpha[:, :, None], axis=1)
    out = acc * tl.where(denominator == 0, 0, 1 / denominator)[:, None]
    token, head = row // heads_per_kv_head, row % heads_per_kv_head
    index = token.to(tl.int64) * num_kv_heads * heads_per_kv_head + head
    out_ptr += index[:, None] * HEAD_DIM + c[None, :]
    inside = (row < rows)[:, None] & (c < HEAD_DIM)[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=inside)
