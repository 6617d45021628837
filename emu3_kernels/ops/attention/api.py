"""Attention. B batch, T queries, S keys, H query heads, G key heads, K head width."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.attention import attention_reference as reference
from emu3_kernels.ops.attention.spans import Dropout, Spans, spans_of
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.dropout import check_dropout, draw_seed

BACKENDS = load("attention", "cpu", "flash_attn", "triton", "xformers", "sdpa")

WHOLE = ("flash_attn", "xformers", "sdpa")
"""Backends that are other libraries' ops, gradient and all; the others are kernels of ours."""


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Average values by the softmax of scores: ``out = softmax(scale * q @ k.T) @ v`` per head.

    Query head h reads key head ``h // (H/G)``; keys and values are not copied for it. Causal
    masks align the last query with the last key. Scores, softmax and sums are float32 (float64
    for float64 inputs), probabilities are rounded to the dtype of v before their product with v,
    results once. A query that sees no key gets 0 and an lse of -inf.

    Differentiable in q, k and v, deterministically; kept are the inputs, the result and the lse.
    Blocks of keys that no query of a block sees are skipped, not masked: documents cost what
    their own squares cost.

    From "FlashAttention-2" (Dao, arXiv 2307.08691); grouped heads from "GQA" (Ainslie et al.,
    arXiv 2305.13245).

    Args:
        q: ``[B, T, H, K]``, any floating dtype.
        k: ``[B, S, G, K]``, G a divisor of H; dtype and device of ``q``.
        v: as ``k``.
        causal: whether query t sees key s only if ``s - S <= t - T``.
        document_ids: ``[B, T]`` int32, non-decreasing along T: a query sees the keys of its own
            document alone. Needs S = T; None is one document.
        scale: factor of the scores; None is ``K ** -0.5``.
        dropout_p: chance of a probability to be dropped, after the softmax, in ``[0, 1)``; which
            are is settled by the seed, the head and the positions alone.
        seed: scalar int64 tensor on the device of ``q``; None draws one.
        return_lse: return the logarithm of the softmax's denominator too, differentiable.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, T, H, K]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, T]`` float32
        (float64 for float64 inputs).
    """
    _check_heads(q, k, v)
    _check_documents(q, k, document_ids)
    check_dropout("attention", dropout_p, seed, q.device)
    asked = (causal, document_ids, dropout_p, return_lse)
    chosen = choose("attention", BACKENDS, backend, q, k, v, *asked)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings = {"causal": causal, "document_ids": document_ids, "scale": scale}
    if chosen in WHOLE:
        return BACKENDS[chosen].attention(q, k, v, dropout_p=dropout_p, **settings)
    if dropout_p > 0 and seed is None:
        seed = draw_seed(q.device)
    if chosen == "reference":
        random = {"dropout_p": dropout_p, "seed": seed}
        return reference.attention(q, k, v, **settings, **random, return_lse=return_lse)
    columns = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
    rows = torch.arange(q.shape[1], dtype=torch.int32, device=q.device) + len(columns) - q.shape[1]
    spans = spans_of(rows, columns, document_ids, document_ids, causal=causal)
    random = (dropout_p, seed, rows, columns) if dropout_p > 0 else (0.0, None, None, None)
    out, lse = _Attention.apply(q, k, v, *spans, scale, *random, chosen)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, end, scale, dropout_p, seed, rows, columns, backend):
        dropout = Dropout(dropout_p, seed, rows, columns) if dropout_p > 0 else None
        out, lse = BACKENDS[backend].forward(q, k, v, Spans(first, end), scale, dropout, wide=False)
        ctx.save_for_backward(q, k, v, first, end, seed, rows, columns, out, lse)
        ctx.settings = scale, dropout_p, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, first, end, seed, rows, columns, out, lse = ctx.saved_tensors
        scale, dropout_p, backend = ctx.settings
        dropout = Dropout(dropout_p, seed, rows, columns) if dropout_p > 0 else None
        dout = torch.zeros_like(out) if dout is None else dout
        # Summed in pairs: what errs here is all that is left of a row that one key dominates.
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        gradients = BACKENDS[backend].backward(
            dout, q, k, v, lse, delta, Spans(first, end), scale, dropout, wide=False
        )
        return *gradients, *[None] * 8


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_floating("attention", q=q, k=k, v=v)
    alike = (q.dtype, q.device) == (k.dtype, k.device) == (v.dtype, v.device)
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape
    if not (alike and fits and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])):
        raise ValueError(
            "attention: q must be [B, T, H, K], k and v [B, S, G, K] of the same dtype and device, "
            f"got {describe(q)}, {describe(k)} and {describe(v)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: the {q.shape[2]} query heads must be a multiple of the key heads, "
            f"got {k.shape[2]}"
        )


def _check_documents(q: Tensor, k: Tensor, document_ids: Tensor | None) -> None:
    """Look at values where that costs no synchronisation: in eager calls on a CPU."""
    if document_ids is None:
        return
    if document_ids.dtype != torch.int32:
        raise TypeError(f"attention: document_ids must be int32, got {document_ids.dtype}")
    if document_ids.shape != q.shape[:2] or document_ids.device != q.device:
        raise ValueError(
            f"attention: document_ids must be {tuple(q.shape[:2])} on {q.device}, "
            f"got {describe(document_ids)}"
        )
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"attention: document_ids need as many keys as queries, got {k.shape[1]} keys for "
            f"{q.shape[1]} queries"
        )
    ascending = (document_ids[:, 1:] >= document_ids[:, :-1]).all()
    must = "attention: document_ids must not decrease along T"
    if torch.compiler.is_compiling() or document_ids.device.type != "cpu":
        torch._assert_async(ascending, must)
    elif not ascending:
        raise ValueError(f"{must}, got {document_ids.tolist()}")
