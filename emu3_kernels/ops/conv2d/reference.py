"""The definition of conv3x3 in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(compute), weight.to(compute), bias.to(compute), padding=1)
    return (y if residual is None else y + residual).to(x.dtype)
