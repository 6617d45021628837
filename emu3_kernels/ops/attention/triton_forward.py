"""Attention in Triton, forward: a program for a block of queries of one head.

The largest score and the sum of exponentials of every query are kept while blocks of keys pass by.

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

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # of a running maximum: a query that sees nothing must leave no NaN


def tile(q: Tensor, dropout: Dropout | None) -> Tile:
    """One program of 8 warps a multiprocessor: 4 warps spill, and so do 128 keys.

    Heads of 64 leave shared memory for a third block under way. Dropout takes registers and masks,
    of which gfx942 has few.
    """
    if q.dtype == torch.float32:
        return Tile(32, 32, num_warps=4, num_stages=2)
    if dropout and launch.WARP == 64:
        return Tile(64, 32, num_warps=4, num_stages=2)
    return Tile(128, 64, num_warps=8, num_stages=3 if q.shape[3] <= 64 else 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, dropout: Dropout | None, wide: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    batch, num_queries, num_heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if out.numel():
        # Scores are compared before they are scaled: the scale must be above 0.
        q, scale = (q, scale) if scale >= 0 else (-q, -scale)
        chosen = tile(q, dropout)
        grid = (triton.cdiv(num_queries, chosen.queries) * batch * num_heads,)
        _fwd_kernel[grid](
            q, k, v, out, lse, *spans, *drops(dropout), max(scale, 1e-30),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], span_stride(spans),
            **heads(q, k), **chosen.options(),
        )  # fmt: skip
    return out, lse


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, end_ptr,
    seed_ptr, rows_ptr, columns_ptr, drop_below, keep_scale, scale,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, span_stride,
    num_queries, num_heads, num_groups,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum(weights * v) / sum(weights);  weights = exp(scale * (q @ k - highest))."""
    batch, group, head, block = place(tl.cdiv(num_queries, QUERIES), num_heads, num_groups)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + group * k_head_stride
    v_ptr += batch * v_batch_stride + group * v_head_stride
    first_ptr += batch * span_stride
    end_ptr += batch * span_stride
    first_key, end_key, first_whole, end_whole = keys_of(
        first_ptr, end_ptr, block * QUERIES, num_queries, QUERIES
    )
    i = block * QUERIES + tl.arange(0, QUERIES)
    row = tl.minimum(i, num_queries - 1)
    first, length = load_spans(first_ptr, end_ptr, row)
    q = load_rows(q_ptr, row, q_token_stride, WIDTH, HEAD)
    nth_head = batch * num_heads + head
    if seed_ptr is not None:
        seed, rows = tl.load(seed_ptr), tl.load(rows_ptr + row)

    out = tl.zeros([QUERIES, HEAD], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    log2_scale = scale * LOG2E
    for start in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        j = start + tl.arange(0, KEYS)
        key = tl.minimum(j, end_key - 1)
        scores = product(q, load_rows(k_ptr, key, k_token_stride, WIDTH, HEAD).T)
        if (start < first_whole) | (start + KEYS > end_whole):
            visible = sees(j[None, :], first[:, None], length[:, None])
            scores = tl.where(visible, scores, -float("inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores * log2_scale - (top * log2_scale)[:, None])
        shrink = tl.exp2((highest - top) * log2_scale)
        total = total * shrink + tl.sum(weights, 1)
        if seed_ptr is not None:
            columns = tl.load(columns_ptr + key)
            kept = keep(seed, drop_below, rows[:, None], columns[None, :], nth_head)
            weights = tl.where(kept, weights, 0)
        v = load_rows(v_ptr, key, v_token_stride, WIDTH, HEAD)
        out = add_product(weights.to(v.dtype), v, out * shrink[:, None])
        highest = top

    inside = i < num_queries
    seen = total > 0
    total = tl.where(seen, total, 1)
    out *= (keep_scale / total)[:, None]
    lse = tl.where(seen, (highest * log2_scale + tl.log2(total)) * LN2, -float("inf"))
    tl.store(lse_ptr + nth_head * num_queries + i, lse, mask=inside)
    out_ptr += (batch * num_queries * num_heads + head) * WIDTH
    store_rows(out_ptr, i, num_heads * WIDTH, out, inside, WIDTH, HEAD)
