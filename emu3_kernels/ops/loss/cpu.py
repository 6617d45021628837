"""Both losses on the CPU: csrc/cpu/loss/cross_entropy.cpp; the GEMMs are those of runtime.gemm.

T tokens.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.loss.chunks import Kernels, as_ops
from emu3_kernels.ops.loss.cpu_chunks import CpuRun
from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend


def why_not(x: Tensor, *_: object) -> str | None:
    return library.why_not_cpu(x)


def forward(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[T]``, and m and log2(l) of the softmax ``[T, 2]``; 0 at weight 0."""
    settings = (z_loss, label_smoothing)
    return torch.ops.emu3_kernels.cross_entropy_forward(logits, targets, weights, *settings)


def backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    softmax: Tensor,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    settings = (z_loss, label_smoothing)
    return torch.ops.emu3_kernels.cross_entropy_backward(
        dlosses.contiguous(), logits, targets, softmax, *settings
    )


def add_(*chunk: Tensor | float) -> None:
    torch.ops.emu3_kernels.linear_cross_entropy_add_(*chunk)


def gradient_(*chunk: Tensor | float) -> None:
    torch.ops.emu3_kernels.linear_cross_entropy_gradient_(*chunk)


losses, gradients = as_ops("cpu", Kernels(add_, gradient_), CpuRun)
BACKENDS = {
    "cross_entropy": Backend(why_not, forward, backward),
    "linear_cross_entropy": Backend(why_not, losses, gradients),
}

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
        softmax: Tensor,
        z_loss: float,
        label_smoothing: float,
    ) -> Tensor:
        return logits.new_empty(logits.shape)
