"""The definition of temporal_residual in plain PyTorch."""

from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.ops.conv3d.reference import convolve


def temporal_residual(
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    plan = Plan(silu=True)
    hidden = convolve(x, weight1, bias1, scale1, shift1, None, plan)
    return convolve(hidden, weight2, bias2, scale2, shift2, x, plan)
