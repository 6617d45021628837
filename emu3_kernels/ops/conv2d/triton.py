"""conv3x3 on a GPU: cuDNN's convolution, then bias and residual in one kernel, not in two.

Tensors are channels-last: ``x [B, H, W, C]``, ``weight [O, 3, 3, C]``.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv2d.gradient import backward
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, next_power_of_2, tile, why_not_triton

ELEMENTS = 4096
"""Of a tile: 64 bytes of bfloat16 a thread."""


def why_not(x: Tensor, weight: Tensor) -> str | None:
    return why_not_triton(x)


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    y = F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), padding=1).movedim(1, -1).contiguous()
    if y.numel():
        channels = y.shape[-1]
        block = min(next_power_of_2(channels), 256)
        options = tile(num_warps=4, ROWS=ELEMENTS // block, BLOCK=block)
        num_pixels = y.shape[0] * y.shape[1] * y.shape[2]
        grid = cdiv(num_pixels, options["ROWS"]), cdiv(channels, block)
        launch(
            conv3x3_add_kernel, grid, y, bias, residual, num_pixels, CHANNELS=channels, **options
        )
    return y


@triton.jit
def conv3x3_add_kernel(
    y_ptr, bias_ptr, residual_ptr, num_pixels,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y += bias + residual."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (pixel < num_pixels)[:, None] & (c < CHANNELS)[None, :]
    at = pixel[:, None] * CHANNELS + c[None, :]
    bias = tl.load(bias_ptr + c, mask=c < CHANNELS, other=0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0).to(tl.float32) + bias[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


BACKENDS = {"conv3x3": Backend(why_not, forward, backward)}
