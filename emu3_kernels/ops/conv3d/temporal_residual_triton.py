"""temporal_residual in Triton: two convolutions of emu3_kernels/_causal_conv, fused each."""

from torch import Tensor

from emu3_kernels.ops.conv3d.contracts import NARROW
from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.ops.conv3d.triton_backward import backward as convolve_backward
from emu3_kernels.ops.conv3d.triton_blocks import why_not
from emu3_kernels.ops.conv3d.triton_forward import forward as convolve
from emu3_kernels.runtime.launch import Config, meta

__all__ = ["CONFIGS", "convolve", "convolve_backward", "forward", "why_not"]
PLAN = Plan(silu=True)


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


def _emu3() -> None:
    """32 latent frames of 512 x 512."""
    vector, weight = meta(4), meta(4, 4, 3, 3, 3)
    forward(meta(1, 4, 32, 64, 64), *(vector, vector, weight, vector) * 2)


CONFIGS = (Config("4 channels", _emu3, NARROW),)
