"""rms_norm in Triton: the row kernels without a residual."""

from torch import Tensor

from emu3_kernels.ops.norm import triton as norm_triton
from emu3_kernels.runtime.launch import why_not_triton

CONFIGS = norm_triton.configs(with_residual=False)


def why_not(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return why_not_triton(x) or why_not_triton(weight)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = norm_triton.forward(x, None, weight, eps)
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dweight = norm_triton.backward(dy, None, x, weight, rstd)
    return dx, dweight
