"""group_norm_silu on the CPU: csrc/cpu/group_norm.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return library.why_not_alike(x, weight, bias)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.group_norm_forward(x, weight, bias, groups, eps, silu)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | int | bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.group_norm_backward(dy, x, weight, bias, *rest)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::group_norm_forward")
    def _(x, weight, bias, groups, eps, silu):
        mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
        return x.new_empty(x.shape), mean, rstd

    @torch.library.register_fake("emu3_kernels::group_norm_backward")
    def _(dy, x, weight, bias, mean, rstd, groups, silu):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))
