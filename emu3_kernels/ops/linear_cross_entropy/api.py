"""The language-model head and its loss. D model width, V classes; ``[...]`` tokens."""

import torch
from torch import Tensor

from emu3_kernels._checks import check_floating, check_has_channels, describe, rows
from emu3_kernels._dispatch import choose, load
from emu3_kernels._token_loss import check_settings, check_targets, divisor, reduce, token_weights
from emu3_kernels.ops.linear_cross_entropy import reference

BACKENDS = load("linear_cross_entropy", "native", "triton")

MEMORY = 768 << 20
"""Bytes that a call may take beyond its gradients, unless it is told otherwise."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory: int = MEMORY,
    backend: str | None = None,
) -> Tensor:
    r"""Average the cross entropy of ``hidden @ head.T`` without keeping the logits.

    The loss is that of :func:`cross_entropy` on ``logits = hidden @ head.T``, with the same
    keywords, reductions and mean over no token. Tokens whose target is ``ignore_index`` or whose
    weight is 0 are dropped before any matrix product, which changes nothing but the time.

    Logits exist for a block of the vocabulary at a time, in the dtype of ``hidden``; their sums
    are float32, and the gradients are rounded once. A vocabulary that fits ``memory`` as one
    block costs three products with gradients; several blocks cost a fourth. Differentiable in
    hidden and head: where a gradient is asked for, the forward pass computes it and keeps it in
    place of the logits, and the backward pass scales it; ``"none"`` computes it in the backward
    pass. The backend ``"reference"`` keeps all logits and knows no ``memory``.

    Args:
        hidden: ``[..., D]``, any floating dtype.
        head: ``[V, D]``, dtype and device of ``hidden``.
        targets: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        weights: ``[...]`` per token, a constant; None is 1.
        normalizer: one number, used as given, so that ranks can share it; a constant.
        z_loss: factor of the squared ``lse``, which keeps the logits from drifting.
        label_smoothing: share of the target's probability that all V classes divide.
        ignore_index: the target of tokens that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        memory: bytes that the call may take beyond its gradients; a block has at least 1,024
            classes, whatever that takes.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; float32 (float64 for float64 inputs).
    """
    _check_operands(hidden, head)
    check_targets(
        "linear_cross_entropy",
        targets,
        shape=hidden.shape[:-1],
        num_classes=head.shape[0],
        ignore_index=ignore_index,
    )
    check_settings("linear_cross_entropy", targets, weights, normalizer, label_smoothing, reduction)
    chosen = choose("linear_cross_entropy", BACKENDS, backend, hidden, head)
    if chosen == "reference":
        return reference.linear_cross_entropy(
            hidden,
            head,
            targets,
            weights=weights,
            normalizer=normalizer,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    weights = token_weights(targets, weights, ignore_index, torch.float32)
    tokens = (rows(hidden), rows(head), targets.flatten())
    settings = (z_loss, label_smoothing, memory, chosen)
    if reduction == "none" or not (
        torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    ):
        losses = _TokenLosses.apply(*tokens, weights.flatten(), *settings).view(targets.shape)
        return reduce(losses, weights, normalizer, reduction)
    shares = torch.where(weights != 0, weights / divisor(weights, normalizer, reduction), 0)
    return _TotalLoss.apply(*tokens, shares.flatten(), *settings)


class _TotalLoss(torch.autograd.Function):
    """The sum of ``shares * losses``; its gradients are ready when the forward pass ends.

    The backward pass scales them in place and gives them away; one that comes again, through a
    retained graph, computes them anew.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, shares, z_loss, label_smoothing, memory, backend):
        settings = (z_loss, label_smoothing, memory)
        operands = (hidden, head, targets, shares)
        losses, *ctx.gradients = BACKENDS[backend].gradients(*operands, *settings)
        ctx.save_for_backward(*operands)
        ctx.settings, ctx.backend = settings, backend
        return (shares * losses).sum()

    @staticmethod
    def backward(ctx, dtotal):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = BACKENDS[ctx.backend].gradients(*ctx.saved_tensors, *ctx.settings)
        dhidden, dhead = (gradient.mul_(dtotal) for gradient in gradients)
        return dhidden, dhead, *[None] * 6


class _TokenLosses(torch.autograd.Function):
    """The losses of the tokens before their weights, 0 where the weight is."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, z_loss, label_smoothing, memory, backend):
        settings = (z_loss, label_smoothing, memory)
        ctx.save_for_backward(hidden, head, targets)
        ctx.settings, ctx.backend = settings, backend
        return BACKENDS[backend].losses(hidden, head, targets, weights, *settings)

    @staticmethod
    def backward(ctx, dlosses):
        _, dhidden, dhead = BACKENDS[ctx.backend].gradients(
            *ctx.saved_tensors, dlosses, *ctx.settings
        )
        return dhidden, dhead, *[None] * 6


def _check_operands(hidden: Tensor, head: Tensor) -> None:
    check_floating("linear_cross_entropy", hidden=hidden, head=head)
    check_has_channels("linear_cross_entropy", hidden=hidden)
    alike = (hidden.dtype, hidden.device) == (head.dtype, head.device)
    if not alike or head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [..., D] and head [V, D] of the same dtype and "
            f"device, got {describe(hidden)} and {describe(head)}"
        )
