"""The group norms on the CPU: csrc/cpu/group_norm."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend


def why_not(x: Tensor, *others: Tensor) -> str | None:
    return library.why_not_alike(x, *others)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.group_norm_forward(x, weight, bias, groups, eps, silu)


def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | int | bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.group_norm_backward(dy, x, weight, bias, *rest)


def spatial_norm(
    x: Tensor, latent: Tensor, *rest: Tensor | int | float | bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.emu3_kernels.spatial_norm_forward(x, latent, *rest)


def spatial_norm_backward(
    dy: Tensor, x: Tensor, latent: Tensor, *rest: Tensor | int | bool
) -> tuple[Tensor, ...]:
    dx, dlatent, *others = torch.ops.emu3_kernels.spatial_norm_backward(dy, x, latent, *rest)
    return dx, dlatent.to(latent.dtype), *others


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::group_norm_forward")
    def _(x, weight, bias, groups, eps, silu):
        mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
        return x.new_empty(x.shape), mean, rstd

    @torch.library.register_fake("emu3_kernels::group_norm_backward")
    def _(dy, x, weight, bias, mean, rstd, groups, silu):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))

    @torch.library.register_fake("emu3_kernels::spatial_norm_forward")
    def _(x, latent, w, b, yw, yb, bw, bb, groups, eps, silu):
        mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
        return x.new_empty(x.shape), mean, rstd

    @torch.library.register_fake("emu3_kernels::spatial_norm_backward")
    def _(dy, x, latent, w, b, yw, yb, bw, bb, mean, rstd, groups, silu):
        dlatent = latent.new_empty(latent.shape, dtype=torch.float32)
        others = (tensor.new_empty(tensor.shape) for tensor in (w, b, yw, yb, bw, bb))
        return x.new_empty(x.shape), dlatent, *others


BACKENDS = {
    "group_norm_silu": Backend(why_not, group_norm, group_norm_backward),
    "spatial_norm_silu": Backend(why_not, spatial_norm, spatial_norm_backward),
}
