"""Attention of a sequence over a ring of ranks. B batch, T tokens, H, G heads, K head width."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.attention import ring_attention_reference as reference
from emu3_kernels.ops.attention.ring import ring
from emu3_kernels.ops.attention.ring.agreement import Facts, agree, failing_together, waiting
from emu3_kernels.ops.attention.ring.schedule import Schedule, ring_schedule
from emu3_kernels.ops.attention.ring.shards import Zigzag, gather
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.dropout import check_dropout, draw_seed

BACKENDS = load("ring_attention", "cpu", "triton")


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
    backend: str | None = None,
) -> Tensor:
    r"""Return this rank's shard of :func:`attention` over a sequence that a group shares.

    Every rank holds its zigzag shard, as :func:`shard_sequence` cuts it, of T tokens in all. Keys
    and values of the G key heads travel from their owner to the ranks that see them, in pieces,
    while others are attended to: what no query of a rank sees is not sent to it. Partial results
    are float32, merged as ``out -= sigmoid(lse_b - lse_a) * (out_a - out_b)`` in the order of
    hops, and rounded once; a group of one process is :func:`attention`, bit for bit.

    Differentiable in q, k and v, deterministically; kept are the inputs, the result and the lse.
    Backward, keys and values travel again and dk and dv return in float32 to their owner. A
    training step takes at most 1.5 times the memory of a rank's shards (q, k, v, out and their
    gradients) and the keys and values of two whole shards.

    All ranks have to call, with the same settings: one message of some 100 bytes compares them
    (document_ids are gathered too), so a GPU is waited for once a call, and ``torch.compile``
    breaks its graph here. Where a rank refuses its arguments, all raise; where one fails later,
    the others raise within the timeout of the group, with its message.

    From "Ring Attention" (Liu et al., arXiv 2310.01889); zigzag shards from "The Llama 3 Herd of
    Models" (arXiv 2407.21783, 3.3.2).

    Args:
        q: ``[B, T/P, H, K]``, any floating dtype.
        k: ``[B, T/P, G, K]``, G a divisor of H; dtype and device of ``q``.
        v: as ``k``.
        group: the process group of the ring, NCCL or Gloo.
        causal: whether later keys are hidden.
        document_ids: ``[B, T/P]`` int32, the shard of ids that do not decrease along T: a query
            sees the keys of its own document alone. None is one document.
        scale: factor of the scores; None is ``K ** -0.5``.
        dropout_p: chance of a probability to be dropped, in ``[0, 1)``; what is dropped is what
            :func:`attention` drops of the whole sequence.
        seed: scalar int64 tensor on the device of ``q``, the same on all ranks; None draws one.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, T/P, H, K]`` in the dtype of ``q``.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"ring_attention: group must be a process group of this rank, got {group}")
    chosen, facts, refusal = "reference", Facts(), None
    try:
        _check(q, k, v, document_ids, dropout_p, seed)
        asked = (causal, document_ids, dropout_p, False)
        chosen = choose("ring_attention", BACKENDS, backend, q, k, v, *asked)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        facts = _facts(q, k, v, causal, document_ids, scale, dropout_p, seed, chosen)
    except (TypeError, ValueError, NotImplementedError) as error:
        refusal = error
    size = 0 if refusal else q.shape[1]
    zigzag, seed = agree(refusal, size, _seed_or_draw(seed, dropout_p, q.device), facts, group)
    schedule, document_ids = _plan(zigzag, causal, document_ids, group)
    settings = {"document_ids": document_ids, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    if chosen == "reference":
        return reference.ring_attention(q, k, v, group=group, causal=causal, **settings)
    call = ring.Call(group, schedule, **settings, kernels=BACKENDS[chosen])
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
) -> None:
    check_floating("ring_attention", q=q, k=k, v=v)
    alike = (q.dtype, q.device) == (k.dtype, k.device) == (v.dtype, v.device)
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape
    if not (alike and fits and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])):
        raise ValueError(
            "ring_attention: q must be [B, T/P, H, K], k and v [B, T/P, G, K] of the same dtype "
            f"and device, got {describe(q)}, {describe(k)} and {describe(v)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"ring_attention: the {q.shape[2]} query heads must be a multiple of the key heads, "
            f"got {k.shape[2]}"
        )
    check_dropout("ring_attention", dropout_p, seed, q.device)
    if document_ids is None:
        return
    if document_ids.dtype != torch.int32:
        raise TypeError(f"ring_attention: document_ids must be int32, got {document_ids.dtype}")
    if document_ids.shape != q.shape[:2] or document_ids.device != q.device:
        raise ValueError(
            f"ring_attention: document_ids must be {tuple(q.shape[:2])} on {q.device}, "
            f"got {describe(document_ids)}"
        )


def _facts(q, k, v, causal, document_ids, scale, dropout_p, seed, chosen) -> Facts:
    return Facts(
        batch=q.shape[0],
        query_heads=q.shape[2],
        key_heads=k.shape[2],
        width=q.shape[3],
        dtype=torch.finfo(q.dtype).eps,
        needs_gradient=needs_gradient(q, k, v),
        causal=causal,
        document_ids=document_ids is not None,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed is not None,
        backend=[*BACKENDS, "reference"].index(chosen),
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
