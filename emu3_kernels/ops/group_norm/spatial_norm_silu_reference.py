"""The definition of spatial_norm_silu in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.group_norm.reference import group_norm


def spatial_norm_silu(
    x: Tensor,
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_weight: Tensor,
    y_bias: Tensor,
    b_weight: Tensor,
    b_bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = group_norm(x.to(compute), weight.to(compute), bias.to(compute), groups, eps)
    pixels = x.shape[2:]
    y = _resized(_convolved(latent.to(compute), y_weight.to(compute), y_bias.to(compute)), pixels)
    b = _resized(_convolved(latent.to(compute), b_weight.to(compute), b_bias.to(compute)), pixels)
    out = normed * y + b
    return (F.silu(out) if silu else out).to(x.dtype)


def _convolved(latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(latent.movedim(1, -1), weight, bias).movedim(-1, 1)


def _resized(x: Tensor, pixels: torch.Size) -> Tensor:
    if x.numel() and 0 not in pixels:
        return F.interpolate(x, size=pixels, mode="nearest")
    return x.flatten(2)[..., :0].reshape(*x.shape[:2], *pixels)  # interpolate refuses no pixels
