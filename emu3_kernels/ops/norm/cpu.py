"""rms_norm and add_rms_norm on the CPU: csrc/cpu/norm/rms_norm.cpp. Arguments: see api.py."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

OPS = torch.ops.emu3_kernels


def why_not(x: Tensor, weight: Tensor) -> str | None:
    if weight.dtype != x.dtype:
        return f"a {weight.dtype} weight on {x.dtype} is left to the reference"
    return library.why_not_cpu(x)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dropout_rows: Tensor | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if residual is None:
        y, rstd = OPS.rms_norm_forward(x, weight, eps)
        return y, x, rstd
    if out is None:
        return OPS.add_rms_norm_forward(x, residual, weight, eps, dropout_p, seed, dropout_rows)
    OPS.add_rms_norm_out(x, residual, weight, eps, dropout_p, seed, dropout_rows, *out)
    return *out, None


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    if dsummed is None:
        dx, dweight = OPS.rms_norm_backward(dy, summed, weight, rstd)
        return dx, None, dweight
    if seed is not None:
        dropout = dropout_p, seed, dropout_rows
        return OPS.add_rms_norm_backward_dropped(dy, dsummed, summed, weight, rstd, *dropout)
    dx, dweight = OPS.add_rms_norm_backward(dy, dsummed, summed, weight, rstd)
    return dx, dx, dweight


BACKENDS = dict.fromkeys(("rms_norm", "add_rms_norm"), Backend(why_not, forward, backward))

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::rms_norm_forward")
    def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("emu3_kernels::rms_norm_backward")
    def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    @torch.library.register_fake("emu3_kernels::add_rms_norm_forward")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        dropout_rows: Tensor | None,
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
        dropout_rows: Tensor | None,
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
        dropout_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dresidual = summed.new_empty(summed.shape), summed.new_empty(summed.shape)
        return dx, dresidual, weight.new_empty(weight.shape)
