"""conv3x3 on the CPU: csrc/cpu/conv2d/conv3x3.cpp; its gradients are PyTorch's own.

Tensors are channels-last: ``x [B, H, W, C]``, ``weight [O, 3, 3, C]``.
"""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.gemm import is_slow

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


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, None for what is not ``needed``."""
    compute = torch.float32 if is_slow(x) else x.dtype
    operands = (t.movedim(-1, 1).to(compute) for t in (dy, x, weight))
    gradients = torch.ops.aten.convolution_backward(
        *operands, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed
    )
    dx, dweight, dbias = (None if g is None else g.to(x.dtype) for g in gradients)
    dx, dweight = (None if g is None else g.movedim(1, -1) for g in (dx, dweight))
    return dx, dweight, dbias


BACKENDS = {"conv3x3": Backend(why_not, forward, backward)}

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::conv3x3")
    def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:3], len(weight)))
