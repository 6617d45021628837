"""AdamW, its learning-rate schedule, and one clipped step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from emu3.config import OptimSettings
from emu3.vision import Quantizer


def build_optimizer(model: nn.Module, settings: OptimSettings) -> AdamW:
    """AdamW with weight decay on matrices and filters, none on gains and biases.

    Codebooks of ``model`` that are running means are updated after each of its steps.
    """
    how = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    optimizer = AdamW(parameter_groups(model, settings), **how, fused=True)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.update_after(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Return the matrices and filters with weight decay, and the rest without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def capturable(optimizer: AdamW) -> AdamW:
    """Let a CUDA graph hold the steps of ``optimizer``, and return it."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    return optimizer


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """Linear warm-up, then cosine or linear decay from ``lr`` to ``min_lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    left = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * left


def take_step(
    model: nn.Module, optimizer: AdamW, loss: Tensor, lr: float | Tensor, settings: OptimSettings
) -> Tensor:
    """Backward, clip, update; return the gradient norm before clipping.

    In a CUDA graph ``lr`` must be a tensor on the GPU, and the optimizer :func:`capturable`.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm
