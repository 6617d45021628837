"""linear on the CPU: csrc/cpu/matmul.cpp.

Tensors are rows: ``x [T, D]``, ``weight [O, D]``, ``bias [O]``.
"""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.gemm import matmul


def why_not(x: Tensor) -> str | None:
    if (reason := library.why_not_cpu(x)) is not None:
        return reason
    return None if x.dtype == torch.bfloat16 else f"{x.dtype} is PyTorch's"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return matmul(x, weight.t(), None if bias is None else bias.unsqueeze(0))


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, None for what is not ``wanted``."""
    dx = matmul(dy, weight) if wanted[0] else None
    dweight = matmul(dy.t(), x) if wanted[1] else None
    dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if wanted[2] else None
    return dx, dweight, dbias
