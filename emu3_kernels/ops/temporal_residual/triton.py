"""temporal_residual in Triton: two convolutions of emu3_kernels/_causal_conv, fused each."""

from torch import Tensor

from emu3_kernels._causal_conv import blocks_triton
from emu3_kernels._causal_conv.backward_triton import backward as convolve_backward
from emu3_kernels._causal_conv.forward_triton import forward as convolve
from emu3_kernels._causal_conv.plan import Plan

__all__ = ["CONFIGS", "convolve", "convolve_backward", "forward", "why_not"]
CONFIGS = ()
PLAN = Plan(silu=True)


def why_not(*operands: Tensor) -> str | None:
    return blocks_triton.why_not(*operands)


def forward(
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
    hidden = convolve(x, weight1, bias1, scale1, shift1, None, PLAN)
    return convolve(hidden, weight2, bias2, scale2, shift2, x, PLAN)
