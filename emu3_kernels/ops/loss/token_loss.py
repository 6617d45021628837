"""What the two losses share: argument checks, the weight of a token, the reduction.

``[...]`` are the leading dimensions of the targets.
"""

import torch
from torch import Tensor

from emu3_kernels.runtime.checks import check_values, describe

REDUCTIONS = ("mean", "sum", "none")


def check_targets(op: str, targets: Tensor, shape: torch.Size) -> None:
    """Raise unless ``targets`` are int64 of ``shape``."""
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be int64, got {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(
            f"{op}: targets must have shape {tuple(shape)}, got {tuple(targets.shape)}"
        )


def check_classes(op: str, targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise unless each of ``targets`` is a class or ``ignore_index``."""
    inside = (targets >= 0) & (targets < num_classes) | (targets == ignore_index)
    check_values(
        op,
        inside.all(),
        classes_rule(num_classes, ignore_index),
        lambda: f"{targets[~inside][0].item()}",
    )


def classes_rule(num_classes: int, ignore_index: int) -> str:
    return f"targets must lie in [0, {num_classes}) or equal ignore_index {ignore_index}"


def check_settings(
    op: str,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor | float | None,
    z_loss: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Raise unless the keyword arguments of a token loss fit its targets."""
    if weights is not None and (weights.shape, weights.device) != (targets.shape, targets.device):
        raise ValueError(
            f"{op}: weights must share shape and device with targets, got "
            f"{describe(weights)} and {describe(targets)}"
        )
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(
            f"{op}: normalizer must hold one number, got shape {tuple(normalizer.shape)}"
        )
    constants = {"weights": weights, "normalizer": normalizer}
    constants |= {"z_loss": z_loss, "label_smoothing": label_smoothing}
    for name, constant in constants.items():
        if isinstance(constant, Tensor) and constant.requires_grad:
            raise ValueError(f"{op}: {name} is a constant, got a tensor that requires grad")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        known = ", ".join(REDUCTIONS)
        raise ValueError(f"{op}: reduction must be one of {known}, got {reduction!r}")


def check_keep(
    op: str, keep: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int
) -> None:
    """Raise unless ``keep`` are the indices of tokens, and each valid one is among them once."""
    if keep.dtype != torch.int64 or keep.dim() != 1 or keep.device != targets.device:
        raise ValueError(f"{op}: keep must be [N] int64 on {targets.device}, got {describe(keep)}")
    valid = (token_weights(targets, weights, ignore_index, torch.float32) != 0).flatten()
    check_values(
        op,
        valid[keep].sum() == valid.sum(),
        "keep must hold every valid token once",
        lambda: f"{int(valid[keep].sum())} of {int(valid.sum())}",
    )


def token_weights(
    targets: Tensor, weights: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight of every token in ``dtype``: 0 for an ignored one."""
    valid = targets != ignore_index
    return valid.to(dtype) if weights is None else torch.where(valid, weights, 0).to(dtype)


def divisor(weights: Tensor, normalizer: Tensor | float | None, reduction: str) -> Tensor | float:
    """Return what the weighted sum is divided by; 1 if no token is valid."""
    if isinstance(normalizer, Tensor):
        total = normalizer.to(weights).reshape(())
    elif normalizer is not None:
        total = weights.new_full((), normalizer)
    elif reduction == "mean":
        total = weights.sum()
    else:
        return 1.0
    return torch.where((weights != 0).any(), total, 1)


def reduce(
    losses: Tensor, weights: Tensor, normalizer: Tensor | float | None, reduction: str
) -> Tensor:
    """Reduce the losses of the tokens ``[...]`` with their :func:`token_weights`."""
    weighted = losses * weights
    total = weighted if reduction == "none" else weighted.sum()
    return total / divisor(weights, normalizer, reduction)
