"""The definition of add_rms_norm in plain PyTorch."""

import torch
from torch import Tensor


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = summed.to(compute)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(compute)).to(x.dtype), summed
