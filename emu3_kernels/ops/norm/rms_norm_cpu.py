"""rms_norm on the CPU: csrc/cpu/rms_norm.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if weight.dtype != x.dtype:
        return f"a {weight.dtype} weight on {x.dtype} is left to the reference"
    return library.why_not_cpu(x)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.emu3_kernels.rms_norm_forward(x, weight, eps)


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.emu3_kernels.rms_norm_backward(dy, x, weight, rstd)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::rms_norm_forward")
    def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("emu3_kernels::rms_norm_backward")
    def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)
