"""conv3x3 as PyTorch has it: oneDNN on the CPU, cuDNN on the GPU. It rounds before it adds."""

import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.runtime.gemm import widened


def why_not(x: Tensor, weight: Tensor) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    y = widened(F.conv2d, x, weight, bias, padding=1)
    return y if residual is None else y.add_(residual)
