"""PyTorch's own convolution: oneDNN on the CPU, cuDNN on the GPU; rounded before the residual."""

import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.gemm import in_float32_if_slow


def why_not(x: Tensor, weight: Tensor) -> str | None:
    return None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    y = in_float32_if_slow(F.conv2d, x, weight, bias, padding=1)
    return y if residual is None else y.add_(residual)


BACKENDS = {"conv3x3": Backend(why_not, function=conv3x3)}
