"""add_rms_norm on the CPU: csrc/cpu/rms_norm.cpp."""

import torch
from torch import Tensor

from emu3_kernels import _native


def why_not(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if weight.dtype != x.dtype:
        return f"a {weight.dtype} weight on {x.dtype} is left to the reference"
    return _native.why_not_cpu(x)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.add_rms_norm_forward(x, residual, weight, eps)


def backward(
    dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.ops.emu3_kernels.add_rms_norm_backward(dy, dsummed, summed, weight, rstd)


if not _native.MISSING:

    @torch.library.register_fake("emu3_kernels::add_rms_norm_forward")
    def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rstd = x.new_empty(x.shape[0], dtype=torch.float32)
        return x.new_empty(x.shape), x.new_empty(x.shape), rstd

    @torch.library.register_fake("emu3_kernels::add_rms_norm_backward")
    def _(
        dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        return summed.new_empty(summed.shape), weight.new_empty(weight.shape)
