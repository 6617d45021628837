"""The definition of decode_attention in plain PyTorch."""

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    if page_table is not None and not len(k_cache):  # nor is any row longer than 0
        k_cache = v_cache = k_cache.new_empty(len(q), 0, *k_cache.shape[2:])
    elif page_table is not None:
        # A row has no page where its keys have ended: what the table says there is no index.
        pages = page_table.long().clamp(0, len(k_cache) - 1)
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)
    (new, heads, width), (capacity, groups) = q.shape[1:], k_cache.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    column = torch.arange(capacity, device=q.device)
    absent = (column >= lengths[:, None])[..., None, None]
    k, v = (cache.to(compute).masked_fill(absent, 0) for cache in (k_cache, v_cache))
    last = lengths[:, None] - new + torch.arange(new, device=q.device)
    hidden = (column > last[..., None])[:, None, None]
    q = q.to(compute).unflatten(2, (groups, heads // groups))
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k) * (width**-0.5 if scale is None else scale)
    # Where every key is hidden the softmax is NaN, and the second mask makes it 0.
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    out = torch.einsum("bgrts,bsgk->btgrk", weights, v)
    return out.flatten(2, 3).to(v_cache.dtype)
