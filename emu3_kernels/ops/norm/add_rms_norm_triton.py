"""add_rms_norm in Triton: the row kernels with a residual, which backward is the sum's gradient."""

from torch import Tensor

from emu3_kernels.ops.norm import triton as norm_triton
from emu3_kernels.runtime.launch import why_not_triton

CONFIGS = norm_triton.configs(with_residual=True)


def why_not(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    return why_not_triton(x) or why_not_triton(weight)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_triton.forward(x, residual, weight, eps, dropout_p, seed)


def forward_into(
    y: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    norm_triton.forward_into(y, summed, x, residual, weight, eps, dropout_p, seed)


def backward(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_triton.backward(dy, dsummed, summed, weight, rstd, dropout_p, seed)
