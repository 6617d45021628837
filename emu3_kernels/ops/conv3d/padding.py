# ruff: noqa: N803 (constants of Triton kernels are upper case)
"""What runs before and after a convolution of PyTorch's own, each in one Triton kernel."""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, space_pads
from emu3_kernels.ops.conv3d.triton_gemm import coordinates, load_row
from emu3_kernels.runtime.launch import cdiv, launch, tile

BLOCKS = {"PIXELS": 64, "CHANNELS": 64}


def pad_video(
    x: Tensor, kernel: tuple[int, ...], scale: Tensor | None, shift: Tensor | None, plan: Plan
) -> Tensor:
    """Norm, activate and pad ``[B, C, T, H, W]``; the result is channels-last."""
    batch, channels, frames, height, width = x.shape
    pads = [space_pads(k, s) for k, s in zip(kernel[1:], plan.stride[1:], strict=True)]
    sizes = plan.front + frames, sum(pads[0]) + height, sum(pads[1]) + width
    out = x.new_empty(batch, *sizes, channels)
    num_pixels = sizes[0] * sizes[1] * sizes[2]
    grid = cdiv(num_pixels, BLOCKS["PIXELS"]), cdiv(channels, BLOCKS["CHANNELS"]), batch
    launch(
        causal_conv3d_pad_kernel, grid, x, scale, shift, out, num_pixels, channels, frames,
        height, width, *sizes[1:], plan.front, pads[0][0], pads[1][0], *x.stride(),
        SILU=plan.silu, **tile(num_warps=4, **BLOCKS),
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, post_silu: bool) -> Tensor:
    """Return ``post(y + bias) + residual``, written over ``y [B, O, T, H, W]``."""
    batch, channels, *sizes = y.shape
    num_pixels = sizes[0] * sizes[1] * sizes[2]
    strides = (0,) * 5 if residual is None else residual.stride()
    grid = cdiv(num_pixels, BLOCKS["PIXELS"]), cdiv(channels, BLOCKS["CHANNELS"]), batch
    launch(
        causal_conv3d_finish_kernel, grid, y, bias, residual, num_pixels, channels, *sizes[1:],
        *y.stride(), *strides, SILU=post_silu, **tile(num_warps=4, **BLOCKS),
    )  # fmt: skip
    return y


@triton.jit
def causal_conv3d_pad_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, num_pixels, channels, frames, height, width, out_height,
    out_width, front, top, left, batch_stride, channel_stride, frame_stride, row_stride,
    column_stride, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[p, c] = act(scale * x + shift), and zeros outside of the video."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t, h, w = coordinates(p, out_height, out_width)
    t, h, w = t - front, h - top, w - left
    inside = (t >= 0) & (t < frames) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    exists = c < channels
    inside = inside[:, None] & exists[None, :]
    pixel = t.to(tl.int64) * frame_stride + h * row_stride + w * column_stride
    x_ptr += batch * batch_stride
    at = pixel[:, None] + c.to(tl.int64)[None, :] * channel_stride
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None:
        x = x * load_row(scale_ptr, c, exists) + load_row(shift_ptr, c, exists)
    if SILU:
        x *= tl.sigmoid(x)
    x = tl.where(inside, x, 0.0)
    out_ptr += (batch * num_pixels + p)[:, None] * channels + c[None, :]
    written = (p < num_pixels)[:, None] & exists[None, :]
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def causal_conv3d_finish_kernel(
    y_ptr, bias_ptr, residual_ptr, num_pixels, channels, height, width, batch_stride,
    channel_stride, frame_stride, row_stride, column_stride, r_batch_stride, r_channel_stride,
    r_frame_stride, r_row_stride, r_column_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = post(y + bias) + residual."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t, h, w = coordinates(p, height, width)
    exists = c < channels
    inside = (p < num_pixels)[:, None] & exists[None, :]
    pixel = t.to(tl.int64) * frame_stride + h * row_stride + w * column_stride
    y_ptr += batch * batch_stride + pixel[:, None] + c.to(tl.int64)[None, :] * channel_stride
    y = tl.load(y_ptr, mask=inside, other=0).to(tl.float32)
    if bias_ptr is not None:
        y += load_row(bias_ptr, c, exists)
    if SILU:
        y *= tl.sigmoid(y)
    if residual_ptr is not None:
        pixel = t.to(tl.int64) * r_frame_stride + h * r_row_stride + w * r_column_stride
        at = pixel[:, None] + c.to(tl.int64)[None, :] * r_channel_stride
        y += tl.load(residual_ptr + batch * r_batch_stride + at, mask=inside, other=0).to(
            tl.float32
        )
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)
