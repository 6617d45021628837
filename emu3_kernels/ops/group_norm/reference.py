"""The definitions of the group norms in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = _group_norm(x.to(compute), weight.to(compute), bias.to(compute), groups, eps)
    return (F.silu(y) if silu else y).to(x.dtype)


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
    normed = _group_norm(x.to(compute), weight.to(compute), bias.to(compute), groups, eps)
    y, b = (
        _resize(_pointwise_conv(*(tensor.to(compute) for tensor in args)), x.shape[2:])
        for args in ((latent, y_weight, y_bias), (latent, b_weight, b_bias))
    )
    out = normed * y + b
    return (F.silu(out) if silu else out).to(x.dtype)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Two passes, unlike PyTorch's own kernel for channels-last memory: E[x^2] - E[x]^2 cancels."""
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    centred = grouped - grouped.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    per_channel = (-1, *[1] * (x.dim() - 2))
    return (centred * rstd).view(x.shape) * weight.view(per_channel) + bias.view(per_channel)


def _pointwise_conv(latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(latent.movedim(1, -1), weight, bias).movedim(-1, 1)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.numel() and 0 not in size:
        return F.interpolate(x, size=size, mode="nearest")
    return x.flatten(2)[..., :0].reshape(*x.shape[:2], *size)  # interpolate rejects an empty size
