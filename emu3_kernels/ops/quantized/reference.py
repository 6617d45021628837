"""The definition of quantized_linear in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.quantized.codes import dequantize


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(compute), dequantize(codes, scales, compute)).to(x.dtype)
