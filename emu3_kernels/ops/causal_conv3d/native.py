"""causal_conv3d on the CPU: csrc/cpu/causal_conv.cpp."""

from torch import Tensor

from emu3_kernels._causal_conv import native

forward = native.convolve
backward = native.convolve_backward


def why_not(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return native.why_not(x, weight)
