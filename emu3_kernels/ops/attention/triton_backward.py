"""Attention in Triton, backward: two kernels, each of which writes what no other program adds to.

One takes a block of queries and sums dq over the keys that they see; the other takes a block of
keys and sums dk and dv over the heads that share them and the queries that see them. Both make the
probabilities anew from the lse that they are given, which may be that of more keys than are here.

B batch, T queries, S keys, H query heads, G key heads, K head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.attention.spans import Dropout, Spans
from emu3_kernels.ops.attention.triton_blocks import (
    LOG2E,
    Tile,
    add_product,
    drops,
    heads,
    keys_of,
    load_rows,
    load_spans,
    place,
    product,
    sees,
    span_stride,
    store_rows,
    unit_stride,
)
from emu3_kernels.runtime import launch
from emu3_kernels.runtime.triton_dropout import keep


def tile_of_queries(q: Tensor, dropout: Dropout | None) -> Tile:
    """Two programs share a multiprocessor; fewer keys leave registers to Philox or to gfx942."""
    if q.dtype == torch.float32:
        return Tile(32, 32, num_warps=4, num_stages=2)
    if launch.WARP == 64:
        return Tile(32 if dropout else 64, 32, num_warps=4, num_stages=2)
    return Tile(64, 32 if dropout else 64, num_warps=4, num_stages=2)


def tile_of_keys(q: Tensor, dropout: Dropout | None) -> Tile:
    """dk and dv fill half of the registers: 32 queries where 64 spill; no copy ahead on gfx942."""
    if q.dtype == torch.float32:
        return Tile(32, 32, num_warps=4, num_stages=2)
    if launch.WARP == 64:
        few = Tile(16, 64, num_warps=4, num_stages=1)
        return few if dropout else Tile(32, 64, num_warps=8, num_stages=1)
    queries = 32 if dropout or q.shape[3] <= 64 else 64
    return Tile(queries, 64, num_warps=8, num_stages=2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    spans: Spans,
    scale: float,
    dropout: Dropout | None,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    lse, delta = lse.contiguous(), delta.contiguous()
    dtype = torch.float32 if wide else q.dtype
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    given = (
        q, k, v, dout, lse, delta, *spans, *drops(dropout), scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], span_stride(spans),
    )  # fmt: skip
    (batch, num_queries, num_heads, _), (num_keys, num_groups) = q.shape, k.shape[1:3]
    if dq.numel():
        chosen = tile_of_queries(q, dropout)
        grid = (triton.cdiv(num_queries, chosen.queries) * batch * num_heads,)
        _bwd_q_kernel[grid](dq, *given, **heads(q, k), **chosen.options())
    if dk.numel():
        chosen = tile_of_keys(q, dropout)
        grid = (triton.cdiv(num_keys, chosen.keys) * batch * num_groups,)
        seen_by = queries_of(spans, num_keys, chosen.keys)
        _bwd_k_kernel[grid](
            dk, dv, seen_by, *given, 0 if seen_by.shape[0] == 1 else seen_by.stride(0), num_keys,
            **heads(q, k), **chosen.options(),
        )  # fmt: skip
    return dq, dk, dv


def queries_of(spans: Spans, num_keys: int, block: int) -> Tensor:
    """Find the queries of every block of keys: ``[1 or B, blocks, 4]`` int32.

    The first that sees any of its keys, the one after the last, and the same two for those that
    see all of them.
    """
    low = torch.arange(0, num_keys, block, dtype=torch.int32, device=spans.first.device)
    high = (low + block).clamp(max=num_keys)
    edges = torch.cat([low + 1, high]).expand(spans.first.shape[0], -1).contiguous()
    first, first_whole = torch.searchsorted(spans.end, edges, out_int32=True).chunk(2, dim=1)
    end_whole, end = torch.searchsorted(spans.first, edges, out_int32=True).chunk(2, dim=1)
    return torch.stack([first, end, first_whole, end_whole], dim=-1)


@triton.jit
def _bwd_q_kernel(
    dq_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr,
    seed_ptr, rows_ptr, columns_ptr, drop_below, keep_scale, scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    dout_batch_stride, dout_token_stride, dout_head_stride, span_stride,
    num_queries, num_heads, num_groups,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale * dscores @ k;  dscores = weights * (dout @ v - delta)."""
    batch, group, head, block = place(tl.cdiv(num_queries, QUERIES), num_heads, num_groups)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + group * k_head_stride
    v_ptr += batch * v_batch_stride + group * v_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
    first_ptr += batch * span_stride
    end_ptr += batch * span_stride
    first_key, end_key, first_whole, end_whole = keys_of(
        first_ptr, end_ptr, block * QUERIES, num_queries, QUERIES
    )
    i = block * QUERIES + tl.arange(0, QUERIES)
    row = tl.minimum(i, num_queries - 1)
    first, length = load_spans(first_ptr, end_ptr, row)
    q = load_rows(q_ptr, row, q_token_stride, WIDTH, HEAD)
    dout = load_rows(dout_ptr, row, dout_token_stride, WIDTH, HEAD)
    nth_head = batch * num_heads + head
    lse = tl.load(lse_ptr + nth_head * num_queries + row) * LOG2E
    delta = tl.load(delta_ptr + nth_head * num_queries + row)
    if seed_ptr is not None:
        seed, rows = tl.load(seed_ptr), tl.load(rows_ptr + row)

    dq = tl.zeros([QUERIES, HEAD], tl.float32)
    log2_scale = scale * LOG2E
    for start in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        j = start + tl.arange(0, KEYS)
        key = tl.minimum(j, end_key - 1)
        k = load_rows(k_ptr, key, k_token_stride, WIDTH, HEAD)
        weights = tl.exp2(product(q, k.T) * log2_scale - lse[:, None])
        if (start < first_whole) | (start + KEYS > end_whole):
            weights = tl.where(sees(j[None, :], first[:, None], length[:, None]), weights, 0)
        dweights = product(dout, load_rows(v_ptr, key, v_token_stride, WIDTH, HEAD).T)
        if seed_ptr is not None:
            columns = tl.load(columns_ptr + key)
            kept = keep(seed, drop_below, rows[:, None], columns[None, :], nth_head)
            dweights = tl.where(kept, dweights * keep_scale, 0)
        dq = add_product((weights * (dweights - delta[:, None])).to(k.dtype), k, dq)
    dq_ptr += (batch * num_queries * num_heads + head) * WIDTH
    store_rows(dq_ptr, i, num_heads * WIDTH, dq * scale, i < num_queries, WIDTH, HEAD)


@triton.jit
def _bwd_k_kernel(
    dk_ptr, dv_ptr, seen_by_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    first_ptr, end_ptr, seed_ptr, rows_ptr, columns_ptr, drop_below, keep_scale, scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    dout_batch_stride, dout_token_stride, dout_head_stride, span_stride, seen_by_stride, num_keys,
    num_queries, num_heads, num_groups,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk = scale * dscores.T @ q;  dv = weights.T @ dout;  summed over the heads of a group."""
    program, num_blocks = tl.program_id(0), tl.cdiv(num_keys, KEYS)
    # The first block of keys, which the most queries may see, is first.
    block, program = program % num_blocks, program // num_blocks
    group, batch = (program % num_groups).to(tl.int64), (program // num_groups).to(tl.int64)
    q_ptr += batch * q_batch_stride
    dout_ptr += batch * dout_batch_stride
    first_ptr += batch * span_stride
    end_ptr += batch * span_stride
    seen_by_ptr += batch * seen_by_stride + 4 * block
    first_query, end_query = tl.load(seen_by_ptr), tl.load(seen_by_ptr + 1)
    first_whole, end_whole = tl.load(seen_by_ptr + 2), tl.load(seen_by_ptr + 3)
    j = block * KEYS + tl.arange(0, KEYS)
    key = tl.minimum(j, num_keys - 1)
    k_ptr += batch * k_batch_stride + group * k_head_stride
    v_ptr += batch * v_batch_stride + group * v_head_stride
    k = load_rows(k_ptr, key, k_token_stride, WIDTH, HEAD)
    v = load_rows(v_ptr, key, v_token_stride, WIDTH, HEAD)
    if seed_ptr is not None:
        seed, columns = tl.load(seed_ptr), tl.load(columns_ptr + key)

    dk, dv = tl.zeros([KEYS, HEAD], tl.float32), tl.zeros([KEYS, HEAD], tl.float32)
    log2_scale = scale * LOG2E
    num_steps = tl.cdiv(tl.maximum(end_query - first_query, 0), QUERIES)
    for step in tl.range(0, num_heads // num_groups * num_steps, num_stages=STAGES):
        head = group * (num_heads // num_groups) + step // num_steps
        nth_head = batch * num_heads + head
        start = first_query + step % num_steps * QUERIES
        i = start + tl.arange(0, QUERIES)
        row = tl.minimum(i, end_query - 1)
        q = load_rows(q_ptr + head * q_head_stride, row, q_token_stride, WIDTH, HEAD)
        lse = tl.load(lse_ptr + nth_head * num_queries + row) * LOG2E
        weights = tl.exp2(product(k, q.T) * log2_scale - lse[None, :])
        if (start < first_whole) | (start + QUERIES > end_whole):
            first, length = load_spans(first_ptr, end_ptr, row)
            length = tl.where(i < end_query, length, 0)
            weights = tl.where(sees(j[:, None], first[None, :], length[None, :]), weights, 0)
        dout = load_rows(dout_ptr + head * dout_head_stride, row, dout_token_stride, WIDTH, HEAD)
        dweights = product(v, dout.T)
        dropped = weights
        if seed_ptr is not None:
            rows = tl.load(rows_ptr + row)
            kept = keep(seed, drop_below, rows[None, :], columns[:, None], nth_head)
            dropped = tl.where(kept, weights, 0)
            dweights = tl.where(kept, dweights * keep_scale, 0)
        dv = add_product(dropped.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + nth_head * num_queries + row)
        dk = add_product((weights * (dweights - delta[None, :])).to(q.dtype), q, dk)
    inside = j < num_keys
    offset = (batch * num_keys * num_groups + group) * WIDTH
    store_rows(dk_ptr + offset, j, num_groups * WIDTH, dk * scale, inside, WIDTH, HEAD)
    store_rows(dv_ptr + offset, j, num_groups * WIDTH, dv * keep_scale, inside, WIDTH, HEAD)
