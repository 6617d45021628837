"""What the differentiable ops share."""

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor) -> bool:
    """Say whether autograd has to record a call; ``Function.apply`` alone costs 5 microseconds."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
