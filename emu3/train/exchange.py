"""Differentiable exchanges of a process group: of the tokens of ``[B, T, D]``, or of two dims.

P ranks. Functions of our own: they cost the host a third of DTensor's ``redistribute``.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from emu3_kernels import Documents, HeadShard, attention

# Named so since torch 2.13, which warns of the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_tokens(x: Tensor, group: dist.ProcessGroup, *, whole_gradient: bool = False) -> Tensor:
    """Return all tokens ``[B, T, D]`` of ``x [B, T/P, D]``.

    Args:
        x: contiguous tokens of this rank.
        group: its ranks in the order of tokens.
        whole_gradient: whether every rank has the whole gradient, so that backward takes a slice
            of it; otherwise those of all ranks are added up.
    """
    return _GatherTokens.apply(x, group, whole_gradient)


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's tokens ``[B, T/P, D]`` of the sum of ``x [B, T, D]`` over the ranks."""
    return _ScatterTokens.apply(x, group)


def swap(x: Tensor, joined: int, split: int, group: dist.ProcessGroup) -> Tensor:
    """Join the parts of all ranks along dim ``joined``, and keep this rank's of dim ``split``."""
    return _Swap.apply(x, joined, split, group)


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    document_ids: Documents | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_heads: HeadShard | None = None,
) -> Tensor:
    """Return the attention of contiguous shards ``[B, T/P, H, K]``: all tokens of some heads.

    P must divide the KV heads. ``document_ids`` are those of all T tokens, ``dropout_heads`` those
    of ``q``. From "DeepSpeed Ulysses" (Jacobs et al., arXiv 2309.14509).
    """
    q, k, v = (swap(x, 1, 2, group) for x in (q, k, v))
    if dropout_heads is not None:
        first = dropout_heads.first + dist.get_rank(group) * q.shape[2]
        dropout_heads = dropout_heads._replace(first=first)
    dropout = {"dropout_p": dropout_p, "seed": seed, "dropout_heads": dropout_heads}
    return swap(attention(q, k, v, document_ids=document_ids, **dropout), 2, 1, group)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = x.transpose(0, 1).contiguous()
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather(out, rows, group=group)
    return out.transpose(0, 1)


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = x.transpose(0, 1).contiguous()
    out = rows.new_empty(rows.shape[0] // dist.get_world_size(group), *rows.shape[1:])
    _reduce_scatter(out, rows, group=group)
    return out.transpose(0, 1)


class _GatherTokens(Function):
    @staticmethod
    def forward(ctx, x, group, whole_gradient):
        ctx.group, ctx.whole_gradient = group, whole_gradient
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, dy):
        group = ctx.group
        if ctx.whole_gradient:
            dx = dy.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]
        else:
            dx = _scattered(dy, group)
        return dx, None, None


class _ScatterTokens(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx, dy):
        return _gathered(dy, ctx.group), None


class _Swap(Function):
    @staticmethod
    def forward(ctx, x, joined, split, group):
        ctx.settings = joined, split, group
        sent = torch.stack(x.chunk(dist.get_world_size(group), split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), joined)

    @staticmethod
    def backward(ctx, dy):
        joined, split, group = ctx.settings
        return _Swap.apply(dy, split, joined, group), None, None, None
