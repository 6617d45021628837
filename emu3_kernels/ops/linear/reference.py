"""The definition of linear in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    rest = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), weight.to(compute), rest).to(x.dtype)
