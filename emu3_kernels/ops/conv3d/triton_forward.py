"""A causal convolution in Triton, forward.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.ops.conv3d.triton_blocks import (
    load_row,
    operand,
    panel,
    place,
    product,
    product_dtype,
    product_tile,
    taps,
    tile_of,
)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    y = x.new_empty(out_shape(x, weight, plan))
    if y.numel():
        dtype = product_dtype(x, weight)
        tile = product_tile(dtype, weight.shape[0])
        weights = panel(weight, dtype, tile.results)
        num_pixels, columns = y[0, 0].numel(), weights.shape[2]
        grid = (triton.cdiv(num_pixels, tile.pixels) * (columns // tile.results) * len(y),)
        _fwd_kernel[grid](
            operand(x, scale, shift, plan.silu, dtype), weights, bias, residual, y,
            plan.front, *x.shape[2:], *y.shape[1:], columns,
            POST_SILU=plan.post_silu, CHANNELS=weights.shape[1], **taps(weight, plan.stride),
            **tile.options(),
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def _fwd_kernel(
    operand_ptr, panel_ptr, bias_ptr, residual_ptr, y_ptr, front, frames, height, width,
    num_results, y_frames, y_height, y_width, columns,
    POST_SILU: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PIXELS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = post(operand @ panel + bias) + residual."""
    num_pixels = y_frames * (y_height * y_width)
    batch, _, p, n = tile_of(num_pixels, columns, PIXELS, RESULTS)
    t, h, w = place(p, y_height, y_width)
    operand_ptr += batch * frames * height * width * CHANNELS
    y = product(
        operand_ptr, panel_ptr, t * ST - front, h * SH - (KH - SH + 1) // 2,
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, KT, KH, KW, PIXELS, TERMS, RESULTS, STAGES,
    )  # fmt: skip
    exists = n < num_results
    if bias_ptr is not None:
        y += load_row(bias_ptr, n, exists)
    if POST_SILU:
        y *= tl.sigmoid(y)
    offsets = (batch * num_results + n)[None, :] * num_pixels + p[:, None]
    inside = (p < num_pixels)[:, None] & exists[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
