"""temporal_residual on the CPU: csrc/cpu/causal_conv.cpp."""

import torch
from torch import Tensor

from emu3_kernels import _native
from emu3_kernels._causal_conv.native import convolve, convolve_backward, widened

__all__ = ["convolve", "convolve_backward", "forward", "why_not"]


def why_not(x: Tensor, *_: object) -> str | None:
    return _native.why_not_cpu(x)


def forward(x: Tensor, *weights: Tensor) -> Tensor:
    """Run the block on ``x`` and what follows it in the op's arguments."""
    return torch.ops.emu3_kernels.temporal_residual(x, *widened(*weights))


if not _native.MISSING:

    @torch.library.register_fake("emu3_kernels::temporal_residual")
    def _(x: Tensor, *_weights: Tensor) -> Tensor:
        return x.new_empty(x.shape)
