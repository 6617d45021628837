"""The definition of cross_entropy in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.ops.loss import token_loss as _token_loss


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
) -> Tensor:
    compute = torch.promote_types(logits.dtype, torch.float32)
    weights = _token_loss.token_weights(targets, weights, ignore_index, compute)
    losses = _token_loss.token_losses(logits, targets, weights, z_loss, label_smoothing)
    return _token_loss.reduce(losses, weights, normalizer, reduction)
