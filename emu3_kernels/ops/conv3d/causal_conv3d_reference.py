"""The definition of causal_conv3d in plain PyTorch."""

from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.ops.conv3d.reference import convolve


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    post_activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    front = weight.shape[2] - stride[0]
    plan = Plan(stride, front, activation == "silu", post_activation == "silu")
    return convolve(x, weight, bias, scale, shift, residual, plan)
