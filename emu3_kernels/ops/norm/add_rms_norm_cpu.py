"""add_rms_norm on the CPU: csrc/cpu/rms_norm.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if weight.dtype != x.dtype:
        return f"a {weight.dtype} weight on {x.dtype} is left to the reference"
    return library.why_not_cpu(x)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.add_rms_norm_forward(x, residual, weight, eps, dropout_p, seed)


def forward_into(
    y: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    operands = x, residual, weight, eps, dropout_p, seed
    torch.ops.emu3_kernels.add_rms_norm_out(*operands, y, summed)


def backward(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ops, operands = torch.ops.emu3_kernels, (dy, dsummed, summed, weight, rstd)
    if seed is not None:
        return ops.add_rms_norm_backward_dropped(*operands, dropout_p, seed)
    dx, dweight = ops.add_rms_norm_backward(*operands)
    return dx, dx, dweight


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::add_rms_norm_forward")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rstd = x.new_empty(x.shape[0], dtype=torch.float32)
        return x.new_empty(x.shape), x.new_empty(x.shape), rstd

    @torch.library.register_fake("emu3_kernels::add_rms_norm_out")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        y: Tensor,
        summed: Tensor,
    ) -> None: ...

    @torch.library.register_fake("emu3_kernels::add_rms_norm_backward")
    def _(
        dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        return summed.new_empty(summed.shape), weight.new_empty(weight.shape)

    @torch.library.register_fake("emu3_kernels::add_rms_norm_backward_dropped")
    def _(
        dy: Tensor,
        dsummed: Tensor,
        summed: Tensor,
        weight: Tensor,
        rstd: Tensor,
        dropout_p: float,
        seed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dresidual = summed.new_empty(summed.shape), summed.new_empty(summed.shape)
        return dx, dresidual, weight.new_empty(weight.shape)
