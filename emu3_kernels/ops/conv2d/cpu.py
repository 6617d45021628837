"""conv3x3 on the CPU: csrc/cpu/conv2d/conv3x3.cpp; its gradients are PyTorch's own.

Tensors are channels-last: ``x [B, H, W, C]``, ``weight [O, 3, 3, C]``.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv2d.gradient import backward
from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

MIN_TILES = 128
"""Of an image, 4x4 pixels each: the transformed weights are four times as large as the weights."""
BLOCK_IN, BLOCK_OUT = 16, 64
"""Channels are multiples of these."""


def why_not(x: Tensor, weight: Tensor) -> str | None:
    if (reason := library.why_not_cpu(x)) is not None:
        return reason
    out, channels, height, width = len(weight), *x.shape[1:]
    if x.dtype != torch.bfloat16:
        return f"{x.dtype} would lose precision in the transforms"
    if channels % BLOCK_IN or out % BLOCK_OUT:
        return f"{channels} to {out} channels are not multiples of {BLOCK_IN} and {BLOCK_OUT}"
    if (tiles := -(-height // 4) * -(-width // 4)) < MIN_TILES:
        return f"{tiles} tiles of 4x4 pixels are fewer than {MIN_TILES}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return torch.ops.emu3_kernels.conv3x3(x, weight, bias.float(), residual)


BACKENDS = {"conv3x3": Backend(why_not, forward, backward)}

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::conv3x3")
    def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:3], len(weight)))
