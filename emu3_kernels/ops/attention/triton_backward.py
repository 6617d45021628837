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

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges
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
)
from emu3_kernels.runtime.checks import unit_stride
from emu3_kernels.runtime.launch import cdiv, gpu_of, launch, tile
from emu3_kernels.runtime.triton_dropout import keep

TILE_FLOAT32 = tile(4, 2, BLOCK_M=32, BLOCK_N=32, STAGES=2)
# dq: two programs share a multiprocessor; fewer keys leave registers to Philox or to gfx942.
DQ_TILE = tile(4, 2, BLOCK_M=64, BLOCK_N=64, STAGES=2)
DQ_TILE_OF_DROPOUT = DQ_TILE_WARP64 = tile(4, 2, BLOCK_M=64, BLOCK_N=32, STAGES=2)
DQ_TILE_OF_DROPOUT_WARP64 = TILE_FLOAT32
DQ_TILE_SM100 = tile(8, 2, BLOCK_M=128, BLOCK_N=64, STAGES=2)  # of 64 queries it spills
# dk and dv fill half of the registers: 32 queries where 64 spill; no prefetch on gfx942.
DKDV_TILE = tile(8, 2, BLOCK_M=64, BLOCK_N=64, STAGES=2)
DKDV_TILE_OF_FEW_QUERIES = tile(8, 2, BLOCK_M=32, BLOCK_N=64, STAGES=2)
DKDV_TILE_WARP64 = tile(8, 1, BLOCK_M=32, BLOCK_N=64, STAGES=1)
DKDV_TILE_OF_DROPOUT_WARP64 = tile(4, 1, BLOCK_M=16, BLOCK_N=64, STAGES=1)
# A wgmma of sm_90 has 64 rows a warp group. With 64 keys for two of them ptxas serialised every
# wgmma: on an H200, backward at 8,192 tokens ran at 187 TFLOP/s, and at 273 with 128 keys.
DKDV_TILE_SM90 = tile(8, 2, BLOCK_M=64, BLOCK_N=128, STAGES=2)
DKDV_TILE_OF_DROPOUT_SM90 = tile(8, 2, BLOCK_M=16, BLOCK_N=128, STAGES=2)


def dq_tile(q: Tensor, dropout: Dropout | None) -> dict[str, int | bool]:
    if q.dtype == torch.float32:
        return TILE_FLOAT32
    gpu = gpu_of(q)
    if gpu.warp_size == 64:
        return DQ_TILE_OF_DROPOUT_WARP64 if dropout else DQ_TILE_WARP64
    if dropout:
        return DQ_TILE_OF_DROPOUT
    return DQ_TILE_SM100 if gpu.capability == 100 else DQ_TILE


def dkdv_tile(q: Tensor, head_dim: int, dropout: Dropout | None) -> dict[str, int | bool]:
    if q.dtype == torch.float32:
        return TILE_FLOAT32
    gpu = gpu_of(q)
    if gpu.warp_size == 64:
        return DKDV_TILE_OF_DROPOUT_WARP64 if dropout else DKDV_TILE_WARP64
    if gpu.capability == 90:
        return DKDV_TILE_OF_DROPOUT_SM90 if dropout else DKDV_TILE_SM90
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
    (q, q_strides), (k, k_strides), (v, v_strides) = unit_stride(q), unit_stride(k), unit_stride(v)
    dout, dout_strides = unit_stride(dout)
    lse, delta, out, dlse = sums
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k.shape
    like = {"dtype": dtype, "memory_format": torch.contiguous_format}
    dq, dk, dv = (torch.empty_like(x, **like) for x in (q, k, v))
    tensors = q, k, v, dout, lse, delta
    settings = (
        *dropout_arguments(dropout, q), scale,
        *q_strides, *k_strides, *v_strides, *dout_strides,
        num_queries, num_keys, num_heads, num_kv_heads,
    )  # fmt: skip
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
    if batch * num_queries * num_heads * head_dim:
        chosen = dq_tile(q, dropout)
        grid = (cdiv(num_queries, chosen["BLOCK_M"]) * batch * num_heads,)
        launch(
            attention_bwd_dq_kernel, grid, dq, out, dlse, *tensors, *range_arguments(key_ranges),
            *settings, **constants, **chosen,
        )  # fmt: skip
    if batch * num_keys * num_kv_heads * head_dim:
        chosen = dkdv_tile(q, head_dim, dropout)
        grid = (cdiv(num_keys, chosen["BLOCK_N"]) * batch * num_kv_heads,)
        queries = range_arguments(key_ranges.query_ranges(num_keys))
        launch(
            attention_bwd_dkdv_kernel, grid, dk, dv, *tensors, *queries, *settings,
            **constants, **chosen,
        )  # fmt: skip
    return dq, dk, dv


@triton.jit
def attention_bwd_dq_kernel(
    dq_ptr, out_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    first_ptr, end_ptr, range_stride, offset,
    seed_ptr, q_positions_ptr, k_positions_ptr, first_head, all_heads, drop_below, keep_scale,
    scale,
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
        dropout_head = first_head + batch * all_heads + head

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    log2_scale = scale * LOG2E
    for start in tl.range(first_key, end_key, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        key = tl.minimum(j, end_key - 1)
        k = load_rows(k_ptr, key, k_token_stride, HEAD_DIM, BLOCK_D)
        scores = dot(q, k.T)
        # Before the exponentials, which are computed meanwhile.
        dp = dot(dout, load_rows(v_ptr, key, v_token_stride, HEAD_DIM, BLOCK_D).T)
        p = tl.exp2(scores * log2_scale - lse[:, None])
        if (start < first_whole) | (start + BLOCK_N > end_whole):
            p = tl.where(is_visible(j[None, :], first[:, None], length[:, None]), p, 0)
        if seed_ptr is not None:
            k_position = load_position(k_positions_ptr, key, 0)
            kept = keep(seed, drop_below, q_position[:, None], k_position[None, :], dropout_head)
            dp = tl.where(kept, dp * keep_scale, 0)
        dq = dot_acc((p * (dp - delta[:, None])).to(k.dtype), k, dq)
    store_rows(
        dq_ptr + out_offset, i, num_heads * HEAD_DIM, dq * scale, i < num_queries, HEAD_DIM, BLOCK_D
    )


@triton.jit
def load_query_range(first_ptr, end_ptr, offset, j, num_queries):
    """Return the first query that attends to each of the keys, and the number of its queries."""
    if first_ptr is None:
        first = clip(j + 1 - offset, num_queries)
        return first, num_queries - first
    else:  # noqa: RET505 (Triton compiles what follows a branch that returns)
        first = tl.load(first_ptr + j)
        return first, tl.maximum(tl.load(end_ptr + j) - first, 0)


@triton.jit
def queries_of_block(
    first_ptr, end_ptr, offset, low, num_queries, num_keys, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the range of queries that attend to any key of a block, and that of those to all."""
    high = tl.minimum(low + BLOCK_N, num_keys) - 1
    if first_ptr is None:
        first, first_whole = (
            clip(low + 1 - offset, num_queries),
            clip(high + 1 - offset, num_queries),
        )
        return first, num_queries, first_whole, num_queries
    else:  # noqa: RET505
        return (
            tl.load(first_ptr + low), tl.load(end_ptr + high),
            tl.load(first_ptr + high), tl.load(end_ptr + low),
        )  # fmt: skip


@triton.jit
def attention_bwd_dkdv_kernel(
    dk_ptr, dv_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    first_ptr, end_ptr, range_stride, offset,
    seed_ptr, q_positions_ptr, k_positions_ptr, first_head, all_heads, drop_below, keep_scale,
    scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    dout_batch_stride, dout_token_stride, dout_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk = scale * dscores.T @ q;  dv = p.T @ dout;  summed over the heads of a KV head."""
    # The first blocks of all heads, to which the most queries may attend, are first, so that the
    # last programs to start are the shortest.
    program, num_pairs = tl.program_id(0), tl.num_programs(0) // tl.cdiv(num_keys, BLOCK_N)
    block, program = program // num_pairs, program % num_pairs
    kv_head, batch = (program % num_kv_heads).to(tl.int64), (program // num_kv_heads).to(tl.int64)
    q_ptr += batch * q_batch_stride
    dout_ptr += batch * dout_batch_stride
    if first_ptr is not None:
        first_ptr += batch * range_stride
        end_ptr += batch * range_stride
    first_query, end_query, first_whole, end_whole = queries_of_block(
        first_ptr, end_ptr, offset, block * BLOCK_N, num_queries, num_keys, BLOCK_N
    )
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.minimum(j, num_keys - 1)
    first, length = load_query_range(first_ptr, end_ptr, offset, key, num_queries)
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
        scores = dot(k, q.T)
        # Before the exponentials, which are computed meanwhile.
        dout = load_rows(
            dout_ptr + head * dout_head_stride, row, dout_token_stride, HEAD_DIM, BLOCK_D
        )
        dp = dot(v, dout.T)
        p = tl.exp2(scores * log2_scale - lse[None, :])
        if (start < first_whole) | (start + BLOCK_M > end_whole):
            # Counted from ``start``, since a difference for each pair would stay in registers.
            nth = tl.arange(0, BLOCK_M)
            p = tl.where(is_visible(nth[None, :], (first - start)[:, None], length[:, None]), p, 0)
        dropped_p = p
        if seed_ptr is not None:
            q_position = load_position(q_positions_ptr, row, num_keys - num_queries)
            dropout_head = first_head + batch * all_heads + head
            kept = keep(seed, drop_below, q_position[None, :], k_position[:, None], dropout_head)
            dropped_p = tl.where(kept, p, 0)
            dp = tl.where(kept, dp * keep_scale, 0)
        dv = dot_acc(dropped_p.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + nth_head * num_queries + row)
        dk = dot_acc((p * (dp - delta[None, :])).to(q.dtype), q, dk)
    # Rows counted from the block: those counted from the first key would stay in registers.
    row, stride = tl.arange(0, BLOCK_N), num_kv_heads * HEAD_DIM
    start = ((batch * num_keys + block * BLOCK_N) * num_kv_heads + kv_head) * HEAD_DIM
    inside = row < num_keys - block * BLOCK_N
    store_rows(dk_ptr + start, row, stride, dk * scale, inside, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + start, row, stride, dv * keep_scale, inside, HEAD_DIM, BLOCK_D)
