"""The definition of rms_norm in plain PyTorch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(compute)).to(x.dtype)
