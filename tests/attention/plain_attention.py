"""The kernels of a backend of attention in plain PyTorch: an oracle of spans, lse and dropout.

Computed in float64 and rounded once, so that what is around the kernels makes the error.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.spans import Dropout, Spans
from emu3_kernels.runtime.dropout import keep, keep_scale


def why_not(*_: object) -> None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, dropout: Dropout | None, wide: bool
) -> tuple[Tensor, Tensor]:
    heads = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(heads, dim=2) for x in (k, v))
    scores = _scores(q, k, spans, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("bhts,bshk->bthk", weights * _factor(weights, dropout), v)
    return out.to(torch.float32 if wide else q.dtype), lse.float()


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
    dtype, groups, dout = q.dtype, k.shape[2], dout.double()
    k, v = (x.double().repeat_interleave(q.shape[2] // groups, dim=2) for x in (k, v))
    lse = lse.double().masked_fill(lse == -torch.inf, 0)[..., None]
    weights = (_scores(q, k, spans, scale) - lse).exp()
    factor = _factor(weights, dropout)
    dweights = factor * torch.einsum("bthk,bshk->bhts", dout, v)
    dscores = scale * weights * (dweights - delta[..., None])
    dq = torch.einsum("bhts,bshk->bthk", dscores, k)
    dk = torch.einsum("bhts,bthk->bshk", dscores, q.double())
    dv = torch.einsum("bhts,bthk->bshk", weights * factor, dout)
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return tuple(x.to(torch.float32 if wide else dtype) for x in (dq, dk, dv))


def _scores(q: Tensor, k: Tensor, spans: Spans, scale: float) -> Tensor:
    column = torch.arange(k.shape[1])
    visible = (spans.first[..., None] <= column) & (column < spans.end[..., None])
    scores = scale * torch.einsum("bthk,bshk->bhts", q.double(), k)
    return scores.masked_fill(~visible[:, None], -torch.inf)


def _factor(weights: Tensor, dropout: Dropout | None) -> Tensor | float:
    if dropout is None:
        return 1.0
    batch, heads = weights.shape[:2]
    head = torch.arange(batch * heads).view(batch, heads, 1, 1)
    row, column = dropout.rows.long()[:, None], dropout.columns.long()
    kept = keep(dropout.seed, dropout.p, row, column, head)
    return kept * keep_scale(dropout.p)
