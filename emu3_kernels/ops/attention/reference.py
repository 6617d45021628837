"""The definitions of attention and decode_attention in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Documents
from emu3_kernels.runtime.dropout import HeadShard, keep, keep_scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | Documents | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_heads: HeadShard | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    (batch, num_queries, num_heads, head_dim), (num_keys, num_kv_heads) = q.shape, k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    q_grouped = q.to(compute).unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    row = torch.arange(num_queries, device=q.device)[:, None]
    column = torch.arange(num_keys, device=q.device)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = column <= row + num_keys - num_queries
    if document_ids is not None:
        ids = document_ids.ids if isinstance(document_ids, Documents) else document_ids
        same = ids[:, :, None] == ids[:, None, :]
        visible = (visible & same)[:, None, None]
    scores = torch.einsum("btgrk,bsgk->bgrts", q_grouped, k.to(compute))
    scale = head_dim**-0.5 if scale is None else scale
    scores = (scores * scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    # A query that attends to no key has an lse of -inf, and no probability.
    p = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    if dropout_p > 0:
        shard = dropout_heads or HeadShard(num_heads)
        sequence = torch.arange(batch, device=q.device)[:, None]
        head = (
            torch.arange(num_heads, device=q.device)
            + shard.first_index
            + sequence * shard.num_heads
        )
        head = head.view(scores.shape[:3])
        kept = keep(seed, dropout_p, row + num_keys - num_queries, column, head[..., None, None])
        p = p * kept * keep_scale(dropout_p)
    out = torch.einsum("bgrts,bsgk->btgrk", p, v.to(compute)).flatten(2, 3).to(q.dtype)
    return (out, lse.flatten(1, 2)) if return_lse else out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    if page_table is not None and not len(k_cache):  # nor is any row longer than 0
        k_cache = v_cache = k_cache.new_empty(len(q), 0, *k_cache.shape[2:])
    elif page_table is not None:
        # Entries of the table beyond the keys of a row are arbitrary.
        pages = page_table.long().clamp(0, len(k_cache) - 1)
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)
    (num_new, num_heads, head_dim), (capacity, num_kv_heads) = q.shape[1:], k_cache.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    column = torch.arange(capacity, device=q.device)
    absent = (column >= lengths[:, None])[..., None, None]
    k, v = (cache.to(compute).masked_fill(absent, 0) for cache in (k_cache, v_cache))
    new = (column - (lengths - num_new)[:, None])[:, None]  # which of the new tokens a key is
    if mask is None:
        masked = new > torch.arange(num_new, device=q.device)[:, None]
    else:
        masked = (new >= 0) & (mask[:, :, None] >> new.clamp(0, 63) & 1 == 0)
    masked = (masked | absent.view(*new.shape))[:, None, None]
    q = q.to(compute).unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    scale = head_dim**-0.5 if scale is None else scale
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k) * scale
    # Where every key is masked the softmax is NaN, and the second mask makes it 0.
    p = scores.masked_fill(masked, -torch.inf).softmax(-1).masked_fill(masked, 0)
    out = torch.einsum("bgrts,bsgk->btgrk", p, v)
    return out.flatten(2, 3).to(v_cache.dtype)
