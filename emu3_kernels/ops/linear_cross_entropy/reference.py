"""The definition of linear_cross_entropy in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels import _token_loss


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
) -> Tensor:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weights = _token_loss.token_weights(targets, weights, ignore_index, compute)
    logits = F.linear(hidden.masked_fill((weights == 0)[..., None], 0), head)
    losses = _token_loss.token_losses(logits, targets, weights, z_loss, label_smoothing)
    return _token_loss.reduce(losses, weights, normalizer, reduction)
