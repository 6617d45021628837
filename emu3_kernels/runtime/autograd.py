"""What the differentiable ops share."""

import torch
from torch import Tensor
from torch.autograd import forward_ad, graph


def needs_gradient(*tensors: Tensor) -> bool:
    """Say whether autograd has to record a call; ``Function.apply`` alone costs 5 microseconds."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0  # our functions refuse it: they have no tangents


def mark_written(*tensors: Tensor) -> None:
    """Let autograd know that a call wrote to ``tensors``, as it knows of PyTorch's own."""
    if not torch.compiler.is_compiling():
        graph.increment_version(tensors)
