"""spatial_norm_silu on the CPU: csrc/cpu/spatial_norm.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(x: Tensor, latent: Tensor, *parameters: Tensor) -> str | None:
    return library.why_not_alike(x, latent, *parameters)


def forward(
    x: Tensor, latent: Tensor, *parameters: Tensor | float | bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.spatial_norm_forward(x, latent, *parameters)


def backward(
    dy: Tensor, x: Tensor, latent: Tensor, *rest: Tensor | int | bool
) -> tuple[Tensor, ...]:
    dx, dlatent, *others = torch.ops.emu3_kernels.spatial_norm_backward(dy, x, latent, *rest)
    return dx, dlatent.to(latent.dtype), *others


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::spatial_norm_forward")
    def _(x, latent, w, b, yw, yb, bw, bb, groups, eps, silu):
        mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
        return x.new_empty(x.shape), mean, rstd

    @torch.library.register_fake("emu3_kernels::spatial_norm_backward")
    def _(dy, x, latent, w, b, yw, yb, bw, bb, mean, rstd, groups, silu):
        dlatent = latent.new_empty(latent.shape, dtype=torch.float32)
        others = (tensor.new_empty(tensor.shape) for tensor in (w, b, yw, yb, bw, bb))
        return x.new_empty(x.shape), dlatent, *others
