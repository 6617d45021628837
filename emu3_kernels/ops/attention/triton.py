"""Attention in Triton, forward: a program computes a block of queries of one head.

The maximum score and the sum of exponentials of every query are updated block of keys by block of
keys. ``triton_backward.py`` has the gradients and ``triton_decode.py`` decode_attention.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.attention import triton_decode
from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges
from emu3_kernels.ops.attention.triton_backward import backward, whole_backward
from emu3_kernels.ops.attention.triton_blocks import (
    LOG2E,
    dot,
    dot_acc,
    dropout_arguments,
    is_visible,
    keys_of_block,
    load_key_range,
    load_position,
    load_rows,
    padded,
    program_ids,
    range_arguments,
    store_rows,
)
from emu3_kernels.runtime.checks import unit_stride
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, gpu_of, launch, tile, why_not_triton
from emu3_kernels.runtime.triton_dropout import keep

MAX_HEAD_DIM = 128
"""Channels of a head that the tiles are made for."""

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # of a running maximum: a query without a key must leave no NaN

# One program of 8 warps a multiprocessor: 4 warps spill, and so do 128 keys. A head_dim of 64
# leaves shared memory for a third block in flight.
TILE = tile(8, 2, BLOCK_M=128, BLOCK_N=64, STAGES=2)
TILE_OF_SHORT_HEADS = tile(8, 3, BLOCK_M=128, BLOCK_N=64, STAGES=3)
# Measured on an H200 at a head_dim of 128: 416 TFLOP/s at 8,192 tokens and 427 at 16,384, where the
# tile above had 319 and 379; the tile below 374 and 476.
TILE_SM90 = tile(4, 3, BLOCK_M=64, BLOCK_N=64, STAGES=3)
TILE_OF_MANY_KEYS_SM90 = tile(8, 2, BLOCK_M=128, BLOCK_N=128, STAGES=2)
MANY_KEYS = 12288
# Dropout takes registers and masks, of which gfx942 has few.
TILE_OF_DROPOUT_WARP64 = tile(4, 2, BLOCK_M=64, BLOCK_N=32, STAGES=2)
TILE_FLOAT32 = tile(4, 2, BLOCK_M=32, BLOCK_N=32, STAGES=2)


def why_not(q: Tensor, *_: object) -> str | None:
    if q.shape[3] > MAX_HEAD_DIM:
        return f"the kernels take a head_dim of {MAX_HEAD_DIM} at most, got {q.shape[3]}"
    return why_not_triton(q)


def tile_of(
    q: Tensor, k: Tensor, key_ranges: KeyRanges, dropout: Dropout | None
) -> dict[str, int | bool]:
    if q.dtype == torch.float32:
        return TILE_FLOAT32
    gpu, is_short = gpu_of(q), q.shape[3] <= 64
    if gpu.capability == 90:
        many = key_ranges.first is None and k.shape[1] >= MANY_KEYS
        return TILE_OF_MANY_KEYS_SM90 if many and not (is_short or dropout) else TILE_SM90
    if dropout and gpu.warp_size == 64:
        return TILE_OF_DROPOUT_WARP64
    return TILE_OF_SHORT_HEADS if is_short else TILE


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
    *,
    float32_out: bool = False,
) -> tuple[Tensor, Tensor]:
    (q, q_strides), (k, k_strides), (v, v_strides) = unit_stride(q), unit_stride(k), unit_stride(v)
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k.shape
    dtype = torch.float32 if float32_out else q.dtype
    out = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if batch * num_queries * num_heads * head_dim == 0:
        return out, lse
    if scale < 0:  # scores are compared before they are scaled: the scale must be above 0
        (q, q_strides), scale = unit_stride(-q), -scale
    chosen = tile_of(q, k, key_ranges, dropout)
    grid = (cdiv(num_queries, chosen["BLOCK_M"]) * batch * num_heads,)
    launch(
        attention_fwd_kernel, grid, q, k, v, out, lse,
        *range_arguments(key_ranges), *dropout_arguments(dropout, q), max(scale, 1e-30),
        *q_strides, *k_strides, *v_strides,
        num_queries, num_keys, num_heads, num_kv_heads,
        HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), **chosen,
    )  # fmt: skip
    return out, lse


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, end_ptr, range_stride, offset,
    seed_ptr, q_positions_ptr, k_positions_ptr, first_head, all_heads, drop_below, keep_scale,
    scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum(p * v) / sum(p);  p = exp(scale * (q @ k - m))."""
    batch, kv_head, head, block = program_ids(
        tl.cdiv(num_queries, BLOCK_M), num_heads, num_kv_heads
    )
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    if first_ptr is not None:
        first_ptr += batch * range_stride
        end_ptr += batch * range_stride
    first_key, end_key, first_whole, end_whole = keys_of_block(
        first_ptr, end_ptr, offset, block * BLOCK_M, num_queries, num_keys, BLOCK_M
    )
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(i, num_queries - 1)
    first, length = load_key_range(first_ptr, end_ptr, offset, row, num_keys)
    q = load_rows(q_ptr, row, q_token_stride, HEAD_DIM, BLOCK_D)
    nth_head = batch * num_heads + head
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        q_position = load_position(q_positions_ptr, row, num_keys - num_queries)
        dropout_head = first_head + batch * all_heads + head

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    log2_scale = scale * LOG2E
    for start in tl.range(first_key, end_key, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        key = tl.minimum(j, end_key - 1)
        scores = dot(q, load_rows(k_ptr, key, k_token_stride, HEAD_DIM, BLOCK_D).T)
        if (start < first_whole) | (start + BLOCK_N > end_whole):
            visible = is_visible(j[None, :], first[:, None], length[:, None])
            scores = tl.where(visible, scores, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.exp2(scores * log2_scale - (m_new * log2_scale)[:, None])
        alpha = tl.exp2((m_i - m_new) * log2_scale)
        l_i = l_i * alpha + tl.sum(p, 1)
        if seed_ptr is not None:
            k_position = load_position(k_positions_ptr, key, 0)
            kept = keep(seed, drop_below, q_position[:, None], k_position[None, :], dropout_head)
            p = tl.where(kept, p, 0)
        v = load_rows(v_ptr, key, v_token_stride, HEAD_DIM, BLOCK_D)
        acc = dot_acc(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new

    inside = i < num_queries
    has_keys = l_i > 0
    l_i = tl.where(has_keys, l_i, 1)
    acc *= (keep_scale / l_i)[:, None]
    lse = tl.where(has_keys, (m_i * log2_scale + tl.log2(l_i)) * LN2, -float("inf"))
    tl.store(lse_ptr + nth_head * num_queries + i, lse, mask=inside)
    out_ptr += (batch * num_queries * num_heads + head) * HEAD_DIM
    store_rows(out_ptr, i, num_heads * HEAD_DIM, acc, inside, HEAD_DIM, BLOCK_D)


BACKENDS = {
    "attention": Backend(why_not, forward, whole_backward),
    "ring_attention": Backend(why_not, forward, backward),
    "decode_attention": Backend(triton_decode.why_not, triton_decode.forward),
}
