"""Attention in Triton, backward: two kernels, each of which writes what no other program adds to.

One computes a block of queries and sums dq over the keys they attend to. The other computes a block
of keys and sums dk and dv over the query heads that share them and the queries that attend to them.
Both recompute the probabilities from the given lse, which may be that of more keys than are here.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.attention import key_ranges as ranges
from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges, query_ranges_of
from emu3_kernels.ops.attention.triton_blocks import (
    LOG2E,
    clip,
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
    unit_stride,
)
from emu3_kernels.runtime.launch import cdiv, gpu_of, launch, tile
from emu3_kernels.runtime.triton_dropout import keep

KEY_BLOCK = tl.constexpr(ranges.KEY_BLOCK)

TILE_FLOAT32 = tile(4, 2, BLOCK_M=32, BLOCK_N=32, STAGES=2)
# dq: two programs share a multiprocessor; fewer keys leave registers to Philox or to gfx942.
DQ_TILE = tile(4, 2, BLOCK_M=64, BLOCK_N=64, STAGES=2)
DQ_TILE_OF_DROPOUT = DQ_TILE_WARP64 = tile(4, 2, BLOCK_M=64, BLOCK_N=32, STAGES=2)
DQ_TILE_OF_DROPOUT_WARP64 = TILE_FLOAT32
# dk and dv fill half of the registers: 32 queries where 64 spill; no prefetch on gfx942.
DKDV_TILE = tile(8, 2, BLOCK_M=64, BLOCK_N=64, STAGES=2)
DKDV_TILE_OF_FEW_QUERIES = tile(8, 2, BLOCK_M=32, BLOCK_N=64, STAGES=2)
DKDV_TILE_WARP64 = tile(8, 1, BLOCK_M=32, BLOCK_N=64, STAGES=1)
DKDV_TILE_OF_DROPOUT_WARP64 = tile(4, 1, BLOCK_M=16, BLOCK_N=64, STAGES=1)


def dq_tile(q: Tensor, head_dim: int, dropout: Dropout | None) -> dict[str, int | bool]:
    if q.dtype == torch.float32:
        return TILE_FLOAT32
    if gpu_of(q).warp_size == 64:
        return DQ_TILE_OF_DROPOUT_WARP64 if dropout else DQ_TILE_WARP64
    return DQ_TILE_OF_DROPOUT if dropout else DQ_TILE


def dkdv_tile(q: Tensor, head_dim: int, dropout: Dropout | None) -> dict[str, int | bool]:
    if q.dtype == torch.float32:
        return TILE_FLOAT32
    if gpu_of(q).warp_size == 64:
        return DKDV_TILE_OF_DROPOUT_WARP64 if dropout else DKDV_TILE_WARP64
    return DKDV_TILE_OF_FEW_QUERIES if dropout or head_dim <= 64 else DKDV_TILE


def whole_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``delta = rowsum(dout * out) - dlse`` in the kernel of dq, which dk and dv read."""
    dlse = None if dlse is None else dlse.contiguous()
    sums = lse, torch.empty_like(lse), out, dlse
    return _launch(dout, q, k, v, sums, key_ranges, scale, dropout, q.dtype)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
    *,
    float32_out: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of some of the keys from the lse and the delta of all of them."""
    sums = lse.contiguous(), delta.contiguous(), None, None
    dtype = torch.float32 if float32_out else q.dtype
    return _launch(dout, q, k, v, sums, key_ranges, scale, dropout, dtype)


def _launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = unit_stride(dout), unit_stride(q), unit_stride(k), unit_stride(v)
    lse, delta, out, dlse = sums
    batch, num_queries, num_heads, head_dim = shape = q.shape
    _, num_keys, num_kv_heads, _ = kv_shape = k.shape
    dq = q.new_empty(shape, dtype=dtype)
    dk, dv = k.new_empty(kv_shape, dtype=dtype), k.new_empty(kv_shape, dtype=dtype)
    arguments = (
        q, k, v, dout, lse, delta, *range_arguments(key_ranges), *dropout_arguments(dropout), scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        num_queries, num_keys, num_heads, num_kv_heads,
    )  # fmt: skip
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
    if batch * num_queries * num_heads * head_dim:
        chosen = dq_tile(q, head_dim, dropout)
        grid = (cdiv(num_queries, chosen["BLOCK_M"]) * batch * num_heads,)
        launch(attention_bwd_dq_kernel, grid, dq, out, dlse, *arguments, **constants, **chosen)
    if batch * num_keys * num_kv_heads * head_dim:
        chosen = dkdv_tile(q, head_dim, dropout)
        grid = (cdiv(num_keys, chosen["BLOCK_N"]) * batch * num_kv_heads,)
        query_ranges, stride = key_ranges.query_ranges, 0
        if key_ranges.first is not None:
            if query_ranges is None:
                query_ranges = query_ranges_of(key_ranges, num_keys)
            stride = 0 if query_ranges.shape[0] == 1 else query_ranges.stride(0)
        launch(
            attention_bwd_dkdv_kernel, grid, dk, dv, query_ranges, stride, *arguments,
            **constants, **chosen,
        )  # fmt: skip
    return dq, dk, dv


@triton.jit
def attention_bwd_dq_kernel(
    dq_ptr, out_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    first_ptr, end_ptr, range_stride, offset,
    seed_ptr, q_positions_ptr, k_positions_ptr, drop_below, keep_scale, scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    dout_batch_stride, dout_token_stride, dout_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale * dscores @ k;  dscores = p * (dout @ v - delta).

    Without ``out`` delta is given; else it is computed and stored: ``rowsum(dout * out) - dlse``.
    """
    batch, kv_head, head, block = program_ids(
        tl.cdiv(num_queries, BLOCK_M), num_heads, num_kv_heads
    )
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
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
    dout = load_rows(dout_ptr, row, dout_token_stride, HEAD_DIM, BLOCK_D)
    nth_head = batch * num_heads + head
    nth_row = nth_head * num_queries + row
    lse = tl.load(lse_ptr + nth_row) * LOG2E
    out_offset = (batch * num_queries * num_heads + head) * HEAD_DIM
    if out_ptr is None:
        delta = tl.load(delta_ptr + nth_row)
    else:
        out = load_rows(out_ptr + out_offset, row, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + nth_row)
        tl.store(delta_ptr + nth_row, delta, mask=i < num_queries)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        q_position = load_position(q_positions_ptr, row, num_keys - num_queries)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    log2_scale = scale * LOG2E
    for start in tl.range(first_key, end_key, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        key = tl.minimum(j, end_key - 1)
        k = load_rows(k_ptr, key, k_token_stride, HEAD_DIM, BLOCK_D)
        p = tl.exp2(dot(q, k.T) * log2_scale - lse[:, None])
        if (start < first_whole) | (start + BLOCK_N > end_whole):
            p = tl.where(is_visible(j[None, :], first[:, None], length[:, None]), p, 0)
        dp = dot(dout, load_rows(v_ptr, key, v_token_stride, HEAD_DIM, BLOCK_D).T)
        if seed_ptr is not None:
            k_position = load_position(k_positions_ptr, key, 0)
            kept = keep(seed, drop_below, q_position[:, None], k_position[None, :], nth_head)
            dp = tl.where(kept, dp * keep_scale, 0)
        dq = dot_acc((p * (dp - delta[:, None])).to(k.dtype), k, dq)
    store_rows(dq_ptr + out_offset, i, num_heads * HEAD_DIM, dq * scale, i < num_queries, HEAD_DIM, BLOCK_D)


@triton.jit
def queries_of_block(query_ranges_ptr, offset, block, num_queries, num_keys, BLOCK_N: tl.constexpr):
    """Return the range of queries that attend to any key of a block, and that of those to all."""
    if query_ranges_ptr is None:
        first = clip(block * BLOCK_N + 1 - offset, num_queries)
        high = tl.minimum((block + 1) * BLOCK_N, num_keys)
        return first, num_queries, clip(high - offset, num_queries), num_queries
    else:  # noqa: RET505 (Triton compiles what follows a branch that returns)
        low = query_ranges_ptr + 4 * block * (BLOCK_N // KEY_BLOCK)
        blocks = tl.minimum(BLOCK_N // KEY_BLOCK, tl.cdiv(num_keys - block * BLOCK_N, KEY_BLOCK))
        high = low + 4 * (blocks - 1)
        return tl.load(low), tl.load(high + 1), tl.load(high + 2), tl.load(low + 3)


@triton.jit
def attention_bwd_dkdv_kernel(
    dk_ptr, dv_ptr, query_ranges_ptr, query_ranges_stride,
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    first_ptr, end_ptr, range_stride, offset,
    seed_ptr, q_positions_ptr, k_positions_ptr, drop_below, keep_scale, scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    dout_batch_stride, dout_token_stride, dout_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk = scale * dscores.T @ q;  dv = p.T @ dout;  summed over the heads of a KV head."""
    program, num_blocks = tl.program_id(0), tl.cdiv(num_keys, BLOCK_N)
    # The first block of keys, to which the most queries may attend, is first.
    block, program = program % num_blocks, program // num_blocks
    kv_head, batch = (program % num_kv_heads).to(tl.int64), (program // num_kv_heads).to(tl.int64)
    q_ptr += batch * q_batch_stride
    dout_ptr += batch * dout_batch_stride
    if first_ptr is not None:
        first_ptr += batch * range_stride
        end_ptr += batch * range_stride
        query_ranges_ptr += batch * query_ranges_stride
    first_query, end_query, first_whole, end_whole = queries_of_block(
        query_ranges_ptr, offset, block, num_queries, num_keys, BLOCK_N
    )
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.minimum(j, num_keys - 1)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    k = load_rows(k_ptr, key, k_token_stride, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, key, v_token_stride, HEAD_DIM, BLOCK_D)
    if seed_ptr is not None:
        seed, k_position = tl.load(seed_ptr), load_position(k_positions_ptr, key, 0)

    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    log2_scale = scale * LOG2E
    num_steps = tl.cdiv(tl.maximum(end_query - first_query, 0), BLOCK_M)
    for step in tl.range(0, num_heads // num_kv_heads * num_steps, num_stages=STAGES):
        head = kv_head * (num_heads // num_kv_heads) + step // num_steps
        nth_head = batch * num_heads + head
        start = first_query + step % num_steps * BLOCK_M
        i = start + tl.arange(0, BLOCK_M)
        row = tl.minimum(i, end_query - 1)
        q = load_rows(q_ptr + head * q_head_stride, row, q_token_stride, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + nth_head * num_queries + row) * LOG2E
        p = tl.exp2(dot(k, q.T) * log2_scale - lse[None, :])
        if (start < first_whole) | (start + BLOCK_M > end_whole):
            first, length = load_key_range(first_ptr, end_ptr, offset, row, num_keys)
            length = tl.where(i < end_query, length, 0)
            p = tl.where(is_visible(j[:, None], first[None, :], length[None, :]), p, 0)
        dout = load_rows(
            dout_ptr + head * dout_head_stride, row, dout_token_stride, HEAD_DIM, BLOCK_D
        )
        dp = dot(v, dout.T)
        dropped_p = p
        if seed_ptr is not None:
            q_position = load_position(q_positions_ptr, row, num_keys - num_queries)
            kept = keep(seed, drop_below, q_position[None, :], k_position[:, None], nth_head)
            dropped_p = tl.where(kept, p, 0)
            dp = tl.where(kept, dp * keep_scale, 0)
        dv = dot_acc(dropped_p.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + nth_head * num_queries + row)
        dk = dot_acc((p * (dp - delta[None, :])).to(q.dtype), q, dk)
    inside = j < num_keys
    start = (batch * num_keys * num_kv_heads + kv_head) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_rows(dk_ptr + start, j, stride, dk * scale, inside, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + start, j, stride, dv * keep_scale, inside, HEAD_DIM, BLOCK_D)
