"""What the differentiable ops share."""

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor) -> bool:
    """Say whether autograd has to record a call; ``Function.apply`` alone costs 5 microseconds."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
