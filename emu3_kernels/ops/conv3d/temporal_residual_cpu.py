"""temporal_residual natively: csrc/cpu/causal_conv.cpp, csrc/cuda/temporal_residual.cuh."""

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d import cpu as native
from emu3_kernels.ops.conv3d.cpu import convolve, convolve_backward, factors
from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.runtime import library

__all__ = ["convolve", "convolve_backward", "forward", "why_not"]


def why_not(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, *others: Tensor
) -> str | None:
    return native.why_not(x, weight1, Plan(), scale1, shift1, *others)


def forward(x: Tensor, *operands: Tensor) -> Tensor:
    """Run the block on ``x`` and what follows it in the op's arguments."""
    wide = [factors(x, t) if t.dim() > 1 else t.float() for t in operands]
    return torch.ops.emu3_kernels.temporal_residual(x, *wide)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::temporal_residual")
    def _(x: Tensor, *_weights: Tensor) -> Tensor:
        return x.new_empty(x.shape)
