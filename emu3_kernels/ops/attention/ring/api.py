"""Attention of a sequence over a ring of ranks.

B batch, T tokens, H query heads, KV key/value heads, K head_dim, P ranks.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.ring import reference, ring
from emu3_kernels.ops.attention.ring.agreement import Facts, agree, failing_together, waiting
from emu3_kernels.ops.attention.ring.schedule import Schedule, ring_schedule
from emu3_kernels.ops.attention.ring.shards import Zigzag, gather
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import check_grouped_heads, describe
from emu3_kernels.runtime.dispatch import Backend, Backends
from emu3_kernels.runtime.dropout import (
    HeadShard,
    check_dropout,
    check_dropout_heads,
    draw_seed,
)

RING_ATTENTION = Backends(
    "ring_attention",
    "emu3_kernels.ops.attention",
    reference.ring_attention,
    cpu=("cpu",),
    cuda=("triton",),
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_heads: HeadShard | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Return this rank's shard of :func:`attention` over a sequence that a group shares.

    Every rank holds its zigzag shard, as :func:`shard_sequence` cuts it, of T tokens in all. Keys
    and values of the KV heads are sent by their owner to the ranks that attend to them, in pieces,
    while the kernels work on others: keys to which no query of a rank attends are not sent to it.
    Partial results are float32, merged as ``out -= sigmoid(lse_b - lse_a) * (out_a - out_b)`` in
    the order of hops, and rounded once; a group of one process is :func:`attention`, bit for bit.

    Differentiable in q, k and v, deterministically; the inputs, the result and the lse are saved.
    Backward, keys and values are sent again and dk and dv return in float32 to their owner. A
    training step takes at most 1.5 times the memory of a rank's shards (q, k, v, out and their
    gradients) and the keys and values of two whole shards.

    All ranks must call, with the same settings: one message of some 100 bytes compares them
    (document_ids are gathered too), so the host waits for a GPU once a call, and ``torch.compile``
    breaks its graph here. If the arguments of a rank are invalid, all ranks raise; if a rank fails
    later, the others raise its message within the timeout of the group.

    From "Ring Attention" (Liu et al., arXiv 2310.01889); zigzag shards from "The Llama 3 Herd of
    Models" (arXiv 2407.21783, 3.3.2).

    Args:
        q: ``[B, T/P, H, K]``, any floating dtype.
        k: ``[B, T/P, KV, K]``, H a multiple of KV; dtype and device of ``q``.
        v: as ``k``.
        group: the process group of the ring, NCCL or Gloo.
        causal: whether later keys are masked.
        document_ids: ``[B, T/P]`` int32, the shard of ids that do not decrease along T: a query
            attends only to keys of its own document. None is one document.
        scale: factor of the scores; None is ``K ** -0.5``.
        dropout_p: probability in ``[0, 1)`` of dropping a probability; :func:`attention` of the
            whole sequence drops the same.
        seed: scalar int64 tensor on the device of ``q``, the same on all ranks; None draws one.
        dropout_heads: as in :func:`attention`, the same on all ranks.
        backend: a key of ``RING_ATTENTION``, or None for the first that fits.

    Returns:
        ``[B, T/P, H, K]`` in the dtype of ``q``.
    """
    run = _outside_graphs() if torch.compiler.is_compiling() else _ring_attention
    settings = document_ids, scale, dropout_p, seed, dropout_heads, backend
    return run(q, k, v, group, causal, *settings)


@cache
def _outside_graphs() -> Callable[..., Tensor]:
    """The messages depend on the values of tensors, which a graph does not know."""
    return torch.compiler.disable(_ring_attention)


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    causal: bool,
    document_ids: Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    dropout_heads: HeadShard | None,
    backend: str | None,
) -> Tensor:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"ring_attention: group must be a process group of this rank, got {group}")
    chosen, facts, invalid = RING_ATTENTION["reference"], Facts(), None
    try:
        _check(q, k, v, document_ids, dropout_p, seed, dropout_heads)
        chosen = RING_ATTENTION.choose(backend, q, k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        facts = _facts(q, k, v, causal, document_ids, scale, dropout_p, seed, dropout_heads, chosen)
    except (TypeError, ValueError, NotImplementedError) as error:
        invalid = error
    size = 0 if invalid else q.shape[1]
    zigzag, seed = agree(invalid, size, _seed_or_draw(seed, dropout_p, q.device), facts, group)
    schedule, document_ids = _plan(zigzag, causal, document_ids, group)
    settings = {"document_ids": document_ids, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    settings["dropout_heads"] = dropout_heads
    if chosen.function is not None:
        return chosen.function(q, k, v, group=group, causal=causal, **settings)
    call = ring.Call(group, schedule, **settings, backend=chosen)
    return _RingAttention.apply(q, k, v, call)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call):
        with failing_together(call.group):
            out, lse = ring.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        with failing_together(ctx.call.group):
            return *ring.backward(dout, *ctx.saved_tensors, ctx.call), None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    dropout_heads: HeadShard | None,
) -> None:
    layout = "q must be [B, T/P, H, K], k and v [B, T/P, KV, K]"
    check_grouped_heads("ring_attention", layout, q, k, v)
    check_dropout("ring_attention", dropout_p, seed, q.device)
    if dropout_heads is not None:
        check_dropout_heads("ring_attention", q.shape[2], dropout_heads)
    if document_ids is None:
        return
    if document_ids.dtype != torch.int32:
        raise TypeError(f"ring_attention: document_ids must be int32, got {document_ids.dtype}")
    if document_ids.shape != q.shape[:2] or document_ids.device != q.device:
        raise ValueError(
            f"ring_attention: document_ids must be {tuple(q.shape[:2])} on {q.device}, "
            f"got {describe(document_ids)}"
        )


def _facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    dropout_heads: HeadShard | None,
    chosen: Backend,
) -> Facts:
    return Facts(
        batch=q.shape[0],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=torch.finfo(q.dtype).eps,
        needs_gradient=needs_gradient(q, k, v),
        causal=causal,
        document_ids=document_ids is not None,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed is not None,
        num_heads_of_dropout=dropout_heads.num_heads if dropout_heads else 0,
        first_head_of_dropout=dropout_heads.first_index if dropout_heads else 0,
        backend=[*RING_ATTENTION.values()].index(chosen),
    )


def _seed_or_draw(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor:
    if dropout_p > 0:
        return draw_seed(device) if seed is None else seed
    return torch.zeros((), dtype=torch.int64, device=device)


def _plan(
    zigzag: Zigzag, causal: bool, document_ids: Tensor | None, group: dist.ProcessGroup
) -> tuple[Schedule, Tensor | None]:
    """Return the schedule, and the document ids of the whole sequence."""
    if document_ids is None:
        return ring_schedule(*zigzag, causal=causal), None
    with waiting("for document_ids", group):
        whole = gather(document_ids.T, zigzag, group).T.contiguous()
    on_host = whole.cpu()
    if (on_host[:, 1:] < on_host[:, :-1]).any():
        raise ValueError("ring_attention: document_ids must not decrease along the whole sequence")
    return ring_schedule(*zigzag, causal=causal, document_ids=on_host), whole
