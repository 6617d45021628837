"""Autograd of every op: whether a call is recorded, and which tensors it wrote to."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad, function, graph


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd records the call; ``Function.apply`` alone costs 5 microseconds."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0  # raises in our functions: they have no jvp


def once_differentiable(backward: Callable) -> Callable:
    """As PyTorch's decorator, which is only entered where a second derivative might be recorded."""
    refusing = function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx, *douts):
        return refusing(ctx, *douts) if torch.is_grad_enabled() else backward(ctx, *douts)

    return wrapper


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd that a call wrote to ``tensors``, as PyTorch's own in-place ops do."""
    if not torch.compiler.is_compiling():
        graph.increment_version(tensors)
