"""Cross entropy of logits, and of the logits of a head without keeping them.

V classes, D model width; ``[...]`` any leading dimensions of tokens.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.loss import reference
from emu3_kernels.ops.loss.chunks import Settings
from emu3_kernels.ops.loss.token_loss import (
    check_classes,
    check_keep,
    check_settings,
    check_targets,
    divisor,
    reduce,
    token_weights,
)
from emu3_kernels.ops.loss.vocab_shards import shard_of
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import check_floating, check_has_channels, describe, rows
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.runtime.gemm import autocast


def _checked_reference(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, **settings: object
) -> Tensor:
    check_classes("cross_entropy", targets, logits.shape[-1], ignore_index)
    return reference.cross_entropy(logits, targets, ignore_index=ignore_index, **settings)


CROSS_ENTROPY = Backends(
    "cross_entropy", __package__, _checked_reference, cpu=("cpu",), cuda=("triton",)
)
LINEAR_CROSS_ENTROPY = Backends(
    "linear_cross_entropy",
    __package__,
    reference.linear_cross_entropy,
    cpu=("cpu",),
    cuda=("triton",),
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Average the cross entropy of every token, each with its own weight.

    With ``lse = logsumexp(logits)`` and ``s = label_smoothing``, the loss of a token of weight
    ``w`` is ``w * (lse - (1 - s) * logits[target] - s * mean(logits) + z_loss * lse ** 2)``. A
    token is valid if its target is not ``ignore_index`` and its weight not 0; the logits of other
    tokens are not read, and their loss is 0. ``reduction``:

    - ``"mean"``: the sum over tokens divided by ``normalizer``; None divides by the sum of the
      weights of the valid tokens, and the mean over no token is 0 (with gradient 0).
    - ``"sum"``: the sum, divided by ``normalizer`` only if one is given.
    - ``"none"``: one value per token, divided by ``normalizer`` only if one is given.

    Computed in float32 (float64 for float64 logits); the gradient is rounded once, to the dtype
    of ``logits``. Differentiable in the logits, which are saved for the backward pass beside three
    numbers per token and are never overwritten.

    Args:
        logits: ``[..., V]``, any floating dtype.
        targets: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        weights: ``[...]`` per token, a constant; None is 1.
        normalizer: one number, used as given, so that ranks can share it; a constant.
        z_loss: factor of the squared ``lse``, which keeps the logits from drifting.
        label_smoothing: probability that is spread evenly over all V classes.
        ignore_index: the target of ignored tokens.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; float32 (float64 for float64 logits).
    """
    check_floating("cross_entropy", logits=logits)
    check_has_channels("cross_entropy", logits=logits)
    check_targets("cross_entropy", targets, logits.shape[:-1])
    constants = weights, normalizer, z_loss, label_smoothing, reduction
    check_settings("cross_entropy", targets, *constants)
    chosen = CROSS_ENTROPY.choose(backend, logits)
    if chosen.function is not None:
        return chosen.function(
            logits,
            targets,
            weights=weights,
            normalizer=normalizer,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    check_classes("cross_entropy", targets, logits.shape[-1], ignore_index)
    weights = token_weights(targets, weights, ignore_index, torch.float32)
    losses = _CrossEntropy.apply(
        rows(logits), targets.flatten(), weights.flatten(), z_loss, label_smoothing, chosen
    )
    return reduce(losses.view(targets.shape), weights, normalizer, reduction)


class _CrossEntropy(torch.autograd.Function):
    """The loss of each token before its weight; 0 at weight 0."""

    @staticmethod
    def forward(ctx, logits, targets, weights, z_loss, label_smoothing, backend):
        targets, weights = targets.contiguous(), weights.contiguous()
        settings = (z_loss, label_smoothing)
        losses, softmax = backend.forward(logits, targets, weights, *settings)
        ctx.save_for_backward(logits, targets, softmax, weights)
        ctx.settings, ctx.backend = settings, backend
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        *saved, weights = ctx.saved_tensors
        dlosses = torch.where(weights != 0, dlosses, 0)  # else a NaN times 0
        dlogits = ctx.backend.backward(dlosses, *saved, *ctx.settings)
        return dlogits, None, None, None, None, None


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
    keep: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    return_losses: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Average the cross entropy of ``hidden @ head.T`` without keeping the logits.

    The loss is that of :func:`cross_entropy` on ``logits = hidden @ head.T``, with the same
    keywords, reductions and mean over no token. Ignored tokens and those of weight 0 are dropped
    before any GEMM, which changes the time alone.

    Logits exist for a chunk of tokens or classes at a time, in the dtype of ``hidden``. They are
    accumulated in float32, and so are the gradients of chunks. A call with gradients runs three
    GEMMs (two if only hidden or only head requires a gradient), if all logits fit ``memory``, the
    dtype is float32, the head is frozen, or a float32 sum of dhead fits: ``2 V D`` bytes, since the
    upper halves of its numbers are stored in dhead until they are rounded. Otherwise the GEMM of
    the logits runs twice for all chunks but one. Differentiable in hidden and head: if either
    requires a gradient, the forward pass computes it and saves it instead of the logits, and the
    backward pass scales it; ``"none"`` computes it in the backward pass. The backend
    ``"reference"`` keeps all logits and ignores ``memory``. ``torch.autocast`` casts hidden and
    head, as it does for ``torch.nn.functional.linear``.

    On a GPU dhead stores logits of ``D`` tokens, until it is computed, and ``memory`` is for those
    of the others alone: the GEMM of the logits runs twice for what does not fit, or a float32 sum
    of dhead takes ``4 V D`` bytes. All GEMMs have extents that are multiples of 64, whatever V.

    With a ``group``, rank r holds the classes after those of rank r - 1: any number of them, also
    none. All other arguments are the same on all ranks, and ``targets`` are classes of the whole
    group. All ranks return the same loss and the same dhidden, of all classes, and each the dhead
    of its own rows; two runs give the same bits. ``torch.compile`` breaks its graph there. A rank
    sends 32 bytes per valid token and, for dhidden, ``4 D`` more (float32), once per chunk of
    tokens; and 64 bytes once.

    Args:
        hidden: ``[..., D]``, any floating dtype.
        head: ``[V, D]``, dtype and device of ``hidden``; with a group, the rank's part of it.
        targets: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        weights: ``[...]`` per token, a constant; None is 1.
        normalizer: one number, used as given, so that ranks can share it; a constant.
        z_loss: factor of the squared ``lse``, which keeps the logits from drifting.
        label_smoothing: probability that is spread evenly over all V classes.
        ignore_index: the target of ignored tokens.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        memory: bytes that the call may allocate beyond its gradients. A chunk has at least all
            classes of 64 tokens or 1,024 classes of all tokens (with dhidden in float32), whatever
            the memory, and 8 MiB are reserved for the packed operands of GEMMs. None is 512 MiB
            and copies of hidden, of dhidden and of the float32 sum of dhidden (``12 D`` bytes a
            token in bfloat16); on a GPU, with a gradient for the head and without a group, at
            least an eighth of its memory or 4 GiB, whichever is less.
        keep: ``[N]`` int64, the indices of the only tokens that GEMMs take, in ``[...]`` as one
            dimension. All valid tokens must be among them, each once. With it, a GPU is never
            waited for, and a call can be captured in a CUDA graph. None finds the valid tokens.
        group: the ranks that share the vocabulary, each with its rows of the head.
        return_losses: also return the loss of each token before its weight.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; float32 (float64 for float64 inputs). With
        ``return_losses`` also ``[...]``: 0 at weight 0, without a gradient.
    """
    hidden, head = autocast(hidden), autocast(head)
    _check_operands(hidden, head)
    shard = shard_of(hidden, head, targets, memory, group)
    check_targets("linear_cross_entropy", targets, hidden.shape[:-1])
    check_classes("linear_cross_entropy", targets, shard.num_classes, ignore_index)
    constants = weights, normalizer, z_loss, label_smoothing, reduction
    check_settings("linear_cross_entropy", targets, *constants)
    if keep is not None:
        check_keep("linear_cross_entropy", keep, targets, weights, ignore_index)
    chosen = LINEAR_CROSS_ENTROPY.choose(backend, hidden, head)
    if chosen.function is not None:
        return chosen.function(
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
            return_losses=return_losses,
        )
    weights = token_weights(targets, weights, ignore_index, torch.float32)
    tokens = (rows(hidden), rows(head), targets.flatten(), keep)
    settings = Settings(z_loss, label_smoothing, memory, *shard)
    if reduction == "none" or not needs_gradient(hidden, head):
        losses = _LinearCrossEntropy.apply(*tokens, weights.flatten(), chosen, *settings)
        loss = reduce(losses.view(targets.shape), weights, normalizer, reduction)
    else:
        shares = torch.where(weights != 0, weights / divisor(weights, normalizer, reduction), 0)
        wanted = (hidden.requires_grad, head.requires_grad)
        given = *tokens, shares.flatten(), chosen, *wanted, *settings
        loss, losses = _TotalLinearCrossEntropy.apply(*given)
    return (loss, losses.detach().view(targets.shape)) if return_losses else loss


class _TotalLinearCrossEntropy(torch.autograd.Function):
    """The sum of ``shares * losses``, whose gradients the forward pass computes, and ``losses``.

    The backward pass scales them in place and returns them; a second one, through a retained
    graph, computes them again.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, keep, shares, backend, *settings):
        operands = (hidden, head, targets, shares, keep)
        losses, *ctx.gradients = backend.backward(*operands, *settings)
        ctx.save_for_backward(*operands)
        ctx.settings, ctx.backend = settings, backend
        ctx.mark_non_differentiable(losses)
        return (shares * losses).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, _):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = ctx.backend.backward(*ctx.saved_tensors, *ctx.settings)
        wanted = ctx.needs_input_grad[:2]
        scaled = [g.mul_(dtotal) if w else None for g, w in zip(gradients, wanted, strict=True)]
        if wanted[0]:  # a NaN in dtotal must not reach the tokens of share 0
            scaled[0].masked_fill_(ctx.saved_tensors[3][:, None] == 0, 0)
        return *scaled, *[None] * (4 + len(ctx.settings))


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each token before its weight; 0 at weight 0."""

    @staticmethod
    def forward(ctx, hidden, head, targets, keep, weights, backend, *settings):
        ctx.save_for_backward(hidden, head, targets, weights, keep)
        ctx.settings, ctx.backend = settings, backend
        return backend.forward(hidden, head, targets, weights, keep, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        wanted = ctx.needs_input_grad[:2]
        *operands, weights, keep = ctx.saved_tensors
        dlosses = torch.where(weights != 0, dlosses, 0)  # else a NaN times 0
        _, *gradients = ctx.backend.backward(*operands, dlosses, keep, *wanted, *ctx.settings)
        needed = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        return *needed, *[None] * (4 + len(ctx.settings))


def _check_operands(hidden: Tensor, head: Tensor) -> None:
    check_floating("linear_cross_entropy", hidden=hidden, head=head)
    check_has_channels("linear_cross_entropy", hidden=hidden)
    alike = (hidden.dtype, hidden.device) == (head.dtype, head.device)
    if not alike or head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [..., D] and head [V, D] of the same dtype and "
            f"device, got {describe(hidden)} and {describe(head)}"
        )
