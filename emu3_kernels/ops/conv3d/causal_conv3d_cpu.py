"""causal_conv3d on the CPU (csrc/cpu/causal_conv.cpp) and on a GPU (csrc/cuda/causal_conv.cuh)."""

from torch import Tensor

from emu3_kernels.ops.conv3d import cpu as native
from emu3_kernels.ops.conv3d.plan import Plan

forward = native.convolve
backward = native.convolve_backward


def why_not(x: Tensor, weight: Tensor, *rest: Tensor | Plan | None) -> str | None:
    *others, plan = rest
    return native.why_not(x, weight, plan, *others)
