"""The language-model head and its loss. D model width, V classes; ``[...]`` tokens."""

from torch import Tensor

from emu3_kernels._checks import check_floating, check_has_channels, describe
from emu3_kernels._dispatch import choose, load
from emu3_kernels._token_loss import check_settings, check_targets
from emu3_kernels.ops.linear_cross_entropy import reference

BACKENDS = load("linear_cross_entropy")


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
    backend: str | None = None,
) -> Tensor:
    r"""Average the cross entropy of ``hidden @ head.T`` without keeping the logits.

    The loss is that of :func:`cross_entropy` on ``logits = hidden @ head.T``, with the same
    keywords, reductions and mean over no token.

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
    choose("linear_cross_entropy", BACKENDS, backend, hidden, head)
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


def _check_operands(hidden: Tensor, head: Tensor) -> None:
    check_floating("linear_cross_entropy", hidden=hidden, head=head)
    check_has_channels("linear_cross_entropy", hidden=hidden)
    alike = (hidden.dtype, hidden.device) == (head.dtype, head.device)
    if not alike or head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [..., D] and head [V, D] of the same dtype and "
            f"device, got {describe(hidden)} and {describe(head)}"
        )
