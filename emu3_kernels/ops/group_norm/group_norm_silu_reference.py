"""The definition of group_norm_silu in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.group_norm.reference import group_norm


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = group_norm(x.to(compute), weight.to(compute), bias.to(compute), groups, eps)
    return (F.silu(y) if silu else y).to(x.dtype)
