"""The language-model head and its loss. D model width, V classes; ``[...]`` tokens."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.loss import linear_cross_entropy_reference as reference
from emu3_kernels.ops.loss.blocks import Settings
from emu3_kernels.ops.loss.shards import shard_of
from emu3_kernels.ops.loss.tiles import MEMORY, copies_of
from emu3_kernels.ops.loss.token_loss import (
    check_settings,
    check_targets,
    divisor,
    reduce,
    token_weights,
)
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, check_has_channels, describe, rows
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.gemm import autocast

BACKENDS = load("linear_cross_entropy", "cpu", "triton")


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
    memory: int | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Average the cross entropy of ``hidden @ head.T`` without keeping the logits.

    The loss is that of :func:`cross_entropy` on ``logits = hidden @ head.T``, with the same
    keywords, reductions and mean over no token. Tokens whose target is ``ignore_index`` or whose
    weight is 0 are dropped before any matrix product, which changes nothing but the time.

    Logits exist for a tile of tokens and classes at a time, in the dtype of ``hidden``; their sums
    are float32, and so are the sums of gradients over tiles. With gradients a call costs three
    products (two where hidden or head alone asks for one), if all logits fit ``memory``, the dtype
    is float32, the head is frozen, or a float32 sum of dhead fits: ``2 V D`` bytes, since the upper
    halves of its numbers lie in dhead until they are rounded. Otherwise all logits beyond one tile
    are multiplied again: at most one product more. Differentiable in hidden and head: where a
    gradient is asked for, the forward pass computes it and keeps it in place of the logits, and the
    backward pass scales it; ``"none"`` computes it in the backward pass. The backend
    ``"reference"`` keeps all logits and knows no ``memory``. ``torch.autocast`` narrows hidden and
    head, as it does for ``torch.nn.functional.linear``.

    With a ``group``, rank r holds the classes that follow those of rank r - 1: any number of them,
    none too. Everything else is the same on all ranks, ``targets`` count over the whole group,
    and so is the result: the loss of all classes, all of dhidden, the rows of dhead that are the
    rank's own, the same bits in every run. ``torch.compile`` breaks its graph there. A rank sends
    32 bytes per token that counts and, for dhidden, ``4 D`` more (float32), each once in a tile of
    tokens; and once 64 bytes.

    Args:
        hidden: ``[..., D]``, any floating dtype.
        head: ``[V, D]``, dtype and device of ``hidden``; with a group, the rank's part of it.
        targets: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        weights: ``[...]`` per token, a constant; None is 1.
        normalizer: one number, used as given, so that ranks can share it; a constant.
        z_loss: factor of the squared ``lse``, which keeps the logits from drifting.
        label_smoothing: share of the target's probability that all V classes divide.
        ignore_index: the target of tokens that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        memory: bytes that the call may take beyond its gradients; a tile has at least all classes
            of 64 tokens or 1,024 classes of all of them (and their dhidden in float32), whatever
            that takes, and 8 MiB are kept free for what products pack. None is 512 MiB and copies
            of hidden, of dhidden and of its float32 sum (``12 D`` bytes a token in bfloat16).
        group: the ranks that share the vocabulary, each with its rows of the head.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; float32 (float64 for float64 inputs).
    """
    hidden, head = autocast(hidden), autocast(head)
    _check_operands(hidden, head)
    if memory is None:
        memory = MEMORY + copies_of(hidden.numel(), hidden.dtype)
    shard = shard_of(hidden, head, targets, memory, group)
    check_targets(
        "linear_cross_entropy",
        targets,
        shape=hidden.shape[:-1],
        num_classes=shard.num_classes,
        ignore_index=ignore_index,
    )
    constants = weights, normalizer, z_loss, label_smoothing, reduction
    check_settings("linear_cross_entropy", targets, *constants)
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
            shard=shard,
        )
    weights = token_weights(targets, weights, ignore_index, torch.float32)
    tokens = (rows(hidden), rows(head), targets.flatten())
    settings = Settings(z_loss, label_smoothing, memory, *shard)
    if reduction == "none" or not needs_gradient(hidden, head):
        losses = _TokenLosses.apply(*tokens, weights.flatten(), chosen, *settings)
        return reduce(losses.view(targets.shape), weights, normalizer, reduction)
    shares = torch.where(weights != 0, weights / divisor(weights, normalizer, reduction), 0)
    wanted = (hidden.requires_grad, head.requires_grad)
    return _TotalLoss.apply(*tokens, shares.flatten(), chosen, *wanted, *settings)


class _TotalLoss(torch.autograd.Function):
    """The sum of ``shares * losses``; its gradients are ready when the forward pass ends.

    The backward pass scales them in place and gives them away; one that comes again, through a
    retained graph, computes them anew.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, shares, backend, *settings):
        operands = (hidden, head, targets, shares)
        losses, *ctx.gradients = BACKENDS[backend].gradients(*operands, *settings)
        ctx.save_for_backward(*operands)
        ctx.settings, ctx.backend = settings, backend
        return (shares * losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = BACKENDS[ctx.backend].gradients(*ctx.saved_tensors, *ctx.settings)
        wanted = ctx.needs_input_grad[:2]
        scaled = [g.mul_(dtotal) if w else None for g, w in zip(gradients, wanted, strict=True)]
        if wanted[0]:  # where dtotal is no number, tokens that do not count still have no gradient
            scaled[0].masked_fill_(ctx.saved_tensors[3][:, None] == 0, 0)
        return *scaled, *[None] * (3 + len(ctx.settings))


class _TokenLosses(torch.autograd.Function):
    """The losses of the tokens before their weights, 0 where the weight is."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, backend, *settings):
        ctx.save_for_backward(hidden, head, targets, weights)
        ctx.settings, ctx.backend = settings, backend
        return BACKENDS[backend].losses(hidden, head, targets, weights, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        wanted = ctx.needs_input_grad[:2]
        *operands, weights = ctx.saved_tensors
        dlosses = torch.where(weights != 0, dlosses, 0)  # a NaN times 0 else
        _, *gradients = BACKENDS[ctx.backend].gradients(*operands, dlosses, *wanted, *ctx.settings)
        kept = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        return *kept, *[None] * (3 + len(ctx.settings))


def _check_operands(hidden: Tensor, head: Tensor) -> None:
    check_floating("linear_cross_entropy", hidden=hidden, head=head)
    check_has_channels("linear_cross_entropy", hidden=hidden)
    alike = (hidden.dtype, hidden.device) == (head.dtype, head.device)
    if not alike or head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [..., D] and head [V, D] of the same dtype and "
            f"device, got {describe(hidden)} and {describe(head)}"
        )
