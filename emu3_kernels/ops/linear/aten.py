"""linear as PyTorch has it: oneDNN on the CPU, cuBLAS on the GPU."""

import torch.nn.functional as F
from torch import Tensor


def why_not(x: Tensor) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
