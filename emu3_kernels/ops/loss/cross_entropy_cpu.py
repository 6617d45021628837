"""cross_entropy on the CPU: csrc/cpu/cross_entropy.cpp. T tokens."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(logits: Tensor, *_: object) -> str | None:
    return library.why_not_cpu(logits)


def forward(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[T]`` and the softmax denominators ``[T, 2]``; 0 where the weight is."""
    settings = (z_loss, label_smoothing)
    return torch.ops.emu3_kernels.cross_entropy_forward(logits, targets, weights, *settings)


def backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    denominators: Tensor,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    settings = (z_loss, label_smoothing)
    return torch.ops.emu3_kernels.cross_entropy_backward(
        dlosses.contiguous(), logits, targets, denominators, *settings
    )


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::cross_entropy_forward")
    def _(
        logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return weights.new_empty(weights.shape), weights.new_empty(*weights.shape, 2)

    @torch.library.register_fake("emu3_kernels::cross_entropy_backward")
    def _(
        dlosses: Tensor,
        logits: Tensor,
        targets: Tensor,
        denominators: Tensor,
        z_loss: float,
        label_smoothing: float,
    ) -> Tensor:
        return logits.new_empty(logits.shape)
