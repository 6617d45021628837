"""The kernels of a backend of attention in plain PyTorch: an oracle of key ranges, lse, dropout.

Computed in float64 and rounded once, so that the code around the kernels makes the error.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.dropout import keep, keep_scale


def why_not(*_: object) -> None:
    return None


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
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = _scores(q, k, key_ranges, scale)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("bhts,bshk->bthk", p * _factor(p, dropout), v)
    return out.to(torch.float32 if float32_out else q.dtype), lse.float()


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
    dtype, num_kv_heads, dout = q.dtype, k.shape[2], dout.double()
    k, v = (x.double().repeat_interleave(q.shape[2] // num_kv_heads, dim=2) for x in (k, v))
    lse = lse.double().masked_fill(lse == -torch.inf, 0)[..., None]
    p = (_scores(q, k, key_ranges, scale) - lse).exp()
    factor = _factor(p, dropout)
    dp = factor * torch.einsum("bthk,bshk->bhts", dout, v)
    dscores = scale * p * (dp - delta[..., None])
    dq = torch.einsum("bhts,bshk->bthk", dscores, k)
    dk = torch.einsum("bhts,bthk->bshk", dscores, q.double())
    dv = torch.einsum("bhts,bthk->bshk", p * factor, dout)
    dk, dv = (x.unflatten(2, (num_kv_heads, -1)).sum(3) for x in (dk, dv))
    return tuple(x.to(torch.float32 if float32_out else dtype) for x in (dq, dk, dv))


def _scores(q: Tensor, k: Tensor, key_ranges: KeyRanges, scale: float) -> Tensor:
    column = torch.arange(k.shape[1])
    first, end = key_ranges.tensors(q, k)
    visible = (first[..., None] <= column) & (column < end[..., None])
    scores = scale * torch.einsum("bthk,bshk->bhts", q.double(), k)
    return scores.masked_fill(~visible[:, None], -torch.inf)


def _factor(p: Tensor, dropout: Dropout | None) -> Tensor | float:
    if dropout is None:
        return 1.0
    batch, num_heads = p.shape[:2]
    first, all_heads = dropout.numbering(p.transpose(1, 2))
    head = first + all_heads * torch.arange(batch)[:, None] + torch.arange(num_heads)
    head = head[..., None, None]
    row, column = dropout.q_positions.long()[:, None], dropout.k_positions.long()
    kept = keep(dropout.seed, dropout.p, row, column, head)
    return kept * keep_scale(dropout.p)


def whole_backward(dout, q, k, v, out, lse, dlse, *settings):
    assert dlse is None
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    return backward(dout, q, k, v, lse, delta, *settings)


BACKEND = Backend(why_not, forward, backward)
"""Of ring_attention."""
WHOLE = Backend(why_not, forward, whole_backward)
"""Of attention."""
