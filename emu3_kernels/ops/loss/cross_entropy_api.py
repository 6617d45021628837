"""Cross entropy of logits that exist. V classes; ``[...]`` any leading dimensions of tokens."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.loss import cross_entropy_reference as reference
from emu3_kernels.ops.loss.token_loss import check_settings, check_targets, reduce, token_weights
from emu3_kernels.runtime.checks import check_floating, check_has_channels, rows
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("cross_entropy", "cpu", "triton")


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

    With ``lse = logsumexp(logits)`` and ``s = label_smoothing``, a token of weight ``w`` costs
    ``w * (lse - (1 - s) * logits[target] - s * mean(logits) + z_loss * lse ** 2)``; tokens whose
    target is ``ignore_index`` or whose weight is 0 cost 0 and are not read at all. ``reduction``:

    - ``"mean"``: the sum over tokens divided by ``normalizer``; None divides by the sum of the
      weights of the counted tokens, and the mean over no token is 0 (with gradient 0).
    - ``"sum"``: the sum, divided by ``normalizer`` only if one is given.
    - ``"none"``: one value per token, divided by ``normalizer`` only if one is given.

    Computed in float32 (float64 for float64 logits); the gradient is rounded once, to the dtype
    of ``logits``. Differentiable in the logits, which are kept for the backward pass beside three
    numbers per token and are never overwritten.

    Args:
        logits: ``[..., V]``, any floating dtype.
        targets: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        weights: ``[...]`` per token, a constant; None is 1.
        normalizer: one number, used as given, so that ranks can share it; a constant.
        z_loss: factor of the squared ``lse``, which keeps the logits from drifting.
        label_smoothing: share of the target's probability that all V classes divide.
        ignore_index: the target of tokens that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; float32 (float64 for float64 logits).
    """
    check_floating("cross_entropy", logits=logits)
    check_has_channels("cross_entropy", logits=logits)
    *shape, num_classes = logits.shape
    check_targets(
        "cross_entropy",
        targets,
        shape=torch.Size(shape),
        num_classes=num_classes,
        ignore_index=ignore_index,
    )
    constants = weights, normalizer, z_loss, label_smoothing, reduction
    check_settings("cross_entropy", targets, *constants)
    chosen = choose("cross_entropy", BACKENDS, backend, logits)
    if chosen == "reference":
        return reference.cross_entropy(
            logits,
            targets,
            weights=weights,
            normalizer=normalizer,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    weights = token_weights(targets, weights, ignore_index, torch.float32)
    losses = _TokenLosses.apply(
        rows(logits), targets.flatten(), weights.flatten(), z_loss, label_smoothing, chosen
    )
    return reduce(losses.view(targets.shape), weights, normalizer, reduction)


class _TokenLosses(torch.autograd.Function):
    """The losses of the tokens before their weights, 0 where the weight is."""

    @staticmethod
    def forward(ctx, logits, targets, weights, z_loss, label_smoothing, backend):
        targets, weights = targets.contiguous(), weights.contiguous()
        settings = (z_loss, label_smoothing)
        losses, denominators = BACKENDS[backend].forward(logits, targets, weights, *settings)
        ctx.save_for_backward(logits, targets, denominators, weights)
        ctx.settings, ctx.backend = settings, backend
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        *saved, weights = ctx.saved_tensors
        dlosses = torch.where(weights != 0, dlosses, 0)  # a NaN times 0 else
        dlogits = BACKENDS[ctx.backend].backward(dlosses, *saved, *ctx.settings)
        return dlogits, None, None, None, None, None
