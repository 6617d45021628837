"""The definition of attention in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.runtime.dropout import keep, keep_scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    (batch, num_queries, heads, width), (num_keys, groups) = q.shape, k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    q_grouped = q.to(compute).unflatten(2, (groups, heads // groups))
    row = torch.arange(num_queries, device=q.device)[:, None]
    column = torch.arange(num_keys, device=q.device)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = column <= row + num_keys - num_queries
    if document_ids is not None:
        same = document_ids[:, :, None] == document_ids[:, None, :]
        visible = (visible & same)[:, None, None]
    scores = torch.einsum("btgrk,bsgk->bgrts", q_grouped, k.to(compute))
    scores = (scores * (width**-0.5 if scale is None else scale)).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    # A query that sees nothing has an lse of -inf, and no probability.
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    if dropout_p > 0:
        head = torch.arange(batch * heads, device=q.device).view(scores.shape[:3])[..., None, None]
        kept = keep(seed, dropout_p, row + num_keys - num_queries, column, head)
        weights = weights * kept * keep_scale(dropout_p)
    out = torch.einsum("bgrts,bsgk->btgrk", weights, v.to(compute)).flatten(2, 3).to(q.dtype)
    return (out, lse.flatten(1, 2)) if return_lse else out
