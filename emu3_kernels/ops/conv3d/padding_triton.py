"""What runs before and after a convolution of PyTorch's own, and its gradient: a kernel each.

Of a 16-bit video, 2 bytes an element are read or written for each tensor: x and the padded video
before, y twice and the residual after; dy, y before bias and SiLU, and its gradient back through
bias and SiLU; the gradient of the padded video, x and dx back through SiLU and norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, space_pads, volume
from emu3_kernels.ops.conv3d.triton_gemm import coordinates, load_row
from emu3_kernels.ops.conv3d.triton_sums import add_sums, column_sums
from emu3_kernels.runtime.launch import cdiv, launch, tile
from emu3_kernels.runtime.triton_silu import silu, silu_derivative

BLOCKS = {"PIXELS": 64, "CHANNELS": 64}
CHANNELS_LAST = torch.channels_last_3d


def pad_video(
    x: Tensor, kernel: tuple[int, ...], scale: Tensor | None, shift: Tensor | None, plan: Plan
) -> Tensor:
    """Norm, activate and pad ``[B, C, T, H, W]``; the result is channels-last."""
    batch, channels, frames, height, width = x.shape
    pads = [space_pads(k, s) for k, s in zip(kernel[1:], plan.stride[1:], strict=True)]
    sizes = plan.front + frames, sum(pads[0]) + height, sum(pads[1]) + width
    out = x.new_empty(batch, *sizes, channels)
    num_pixels = sizes[0] * sizes[1] * sizes[2]
    launch(
        causal_conv3d_pad_kernel, _grid(num_pixels, x), x, scale, shift, out, num_pixels, channels,
        frames, height, width, *sizes[1:], plan.front, pads[0][0], pads[1][0], *x.stride(),
        SILU=plan.silu, **tile(num_warps=4, **BLOCKS),
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


def pad_backward(
    dpadded: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx, dscale and dshift for that of a padded video, which is channels-last."""
    channels, _, height, width = x.shape[1:]
    top, left = (space_pads(weight.shape[2 + i], plan.stride[i])[0] for i in (1, 2))
    num_pixels, dx, sums = volume(x.shape), torch.empty_like(x), None
    grid = _grid(num_pixels, x)
    if scale is not None:
        sums = x.new_empty(grid[2] * grid[0], 2, channels, dtype=torch.float32)
    launch(
        causal_conv3d_pad_bwd_kernel, grid, dpadded, x, scale, shift, dx, sums, num_pixels,
        channels, height, width, *dpadded.shape[2:], plan.front, top, left, *x.stride(),
        *dx.stride(), SILU=plan.silu, **tile(num_warps=4, **BLOCKS),
    )  # fmt: skip
    return dx, *add_sums(sums, None, dpadded, weight, None, scale, shift)[2:]


def finish(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, post_silu: bool, *, in_place: bool
) -> Tensor:
    """Return ``post(y + bias) + residual``, channels-last as ``y [B, O, T, H, W]`` is."""
    channels, num_pixels = y.shape[1], volume(y.shape)
    out = y if in_place else torch.empty_like(y)
    strides = (0,) * 5 if residual is None else residual.stride()
    launch(
        causal_conv3d_finish_kernel, _grid(num_pixels, y), y, bias, residual, out, num_pixels,
        channels, *y.shape[3:], *strides, SILU=post_silu, **tile(num_warps=4, **BLOCKS),
    )  # fmt: skip
    return out


def finish_backward(
    dy: Tensor, z: Tensor | None, bias: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of ``z``, channels-last as ``z`` is, and dbias; no SiLU if z is None."""
    channels, num_pixels = dy.shape[1], volume(dy.shape)
    dz, sums, dbias = None, None, None
    if z is not None or not dy.is_contiguous(memory_format=CHANNELS_LAST):
        dz = torch.empty_like(dy, memory_format=CHANNELS_LAST)
    grid = _grid(num_pixels, dy)
    if needs_bias:
        sums = dy.new_empty(grid[2] * grid[0], channels, dtype=torch.float32)
    if dz is not None or needs_bias:
        launch(
            causal_conv3d_finish_bwd_kernel, grid, dy, z, bias, dz, sums, num_pixels, channels,
            *dy.shape[3:], *dy.stride(), **tile(num_warps=4, **BLOCKS),
        )  # fmt: skip
    if needs_bias:
        dbias = column_sums(sums, bias.dtype)
    return dy if dz is None else dz, dbias


def _grid(num_pixels: int, x: Tensor) -> tuple[int, int, int]:
    batch, channels, *_ = x.shape
    return cdiv(num_pixels, BLOCKS["PIXELS"]), cdiv(channels, BLOCKS["CHANNELS"]), batch


@triton.jit
def strided(t, h, w, c, frame_stride, row_stride, column_stride, channel_stride):
    """Return the offsets of pixels and channels in one video of any strides."""
    pixel = t.to(tl.int64) * frame_stride + h * row_stride + w * column_stride
    return pixel[:, None] + c.to(tl.int64)[None, :] * channel_stride


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
    at = strided(t, h, w, c, frame_stride, row_stride, column_stride, channel_stride)
    x = tl.load(x_ptr + batch * batch_stride + at, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None:
        x = x * load_row(scale_ptr, c, exists) + load_row(shift_ptr, c, exists)
    if SILU:
        x = silu(x)
    x = tl.where(inside, x, 0.0)
    out_ptr += (batch * num_pixels + p)[:, None] * channels + c[None, :]
    written = (p < num_pixels)[:, None] & exists[None, :]
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def causal_conv3d_pad_bwd_kernel(
    da_ptr, x_ptr, scale_ptr, shift_ptr, dx_ptr, sums_ptr, num_pixels, channels, height, width,
    a_frames, a_height, a_width, front, top, left, batch_stride, channel_stride, frame_stride,
    row_stride, column_stride, dx_batch_stride, dx_channel_stride, dx_frame_stride, dx_row_stride,
    dx_column_stride, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = scale * du;  du = da * act'(scale * x + shift);  sums of du * x and du."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t, h, w = coordinates(p, height, width)
    exists = c < channels
    inside = (p < num_pixels)[:, None] & exists[None, :]
    a_pixel = ((batch * a_frames + t + front) * a_height + h + top) * a_width + w + left
    da_ptr += a_pixel[:, None] * channels + c[None, :]
    du = tl.load(da_ptr, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None or SILU:
        at = strided(t, h, w, c, frame_stride, row_stride, column_stride, channel_stride)
        x = tl.load(x_ptr + batch * batch_stride + at, mask=inside, other=0).to(tl.float32)
        u = x
        if scale_ptr is not None:
            scale = load_row(scale_ptr, c, exists)
            u = x * scale + load_row(shift_ptr, c, exists)
        if SILU:
            du *= silu_derivative(u)
        if scale_ptr is not None:
            row = batch * tl.num_programs(0) + tl.program_id(0)
            sums_ptr += row * 2 * channels + c
            tl.store(sums_ptr, tl.sum(du * x, axis=0), mask=exists)
            tl.store(sums_ptr + channels, tl.sum(du, axis=0), mask=exists)
            du *= scale
    at = strided(
        t, h, w, c, dx_frame_stride, dx_row_stride, dx_column_stride, dx_channel_stride
    )  # fmt: skip
    dx_ptr += batch * dx_batch_stride + at
    tl.store(dx_ptr, du.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def causal_conv3d_finish_kernel(
    y_ptr, bias_ptr, residual_ptr, out_ptr, num_pixels, channels, height, width, batch_stride,
    channel_stride, frame_stride, row_stride, column_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = post(y + bias) + residual, whose strides are given."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    inside = (p < num_pixels)[:, None] & exists[None, :]
    offsets = (batch * num_pixels + p)[:, None] * channels + c[None, :]
    y = tl.load(y_ptr + offsets, mask=inside, other=0).to(tl.float32)
    if bias_ptr is not None:
        y += load_row(bias_ptr, c, exists)
    if SILU:
        y = silu(y)
    if residual_ptr is not None:
        t, h, w = coordinates(p, height, width)
        at = strided(t, h, w, c, frame_stride, row_stride, column_stride, channel_stride)
        residual_ptr += batch * batch_stride + at
        y += tl.load(residual_ptr, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def causal_conv3d_finish_bwd_kernel(
    dy_ptr, z_ptr, bias_ptr, dz_ptr, sums_ptr, num_pixels, channels, height, width, batch_stride,
    channel_stride, frame_stride, row_stride, column_stride,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz = dy * silu'(z + bias), or dy without z;  sums of dz."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t, h, w = coordinates(p, height, width)
    exists = c < channels
    inside = (p < num_pixels)[:, None] & exists[None, :]
    offsets = (batch * num_pixels + p)[:, None] * channels + c[None, :]
    at = strided(t, h, w, c, frame_stride, row_stride, column_stride, channel_stride)
    dz = tl.load(dy_ptr + batch * batch_stride + at, mask=inside, other=0).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + offsets, mask=inside, other=0).to(tl.float32)
        if bias_ptr is not None:
            z += load_row(bias_ptr, c, exists)
        dz *= silu_derivative(z)
    if dz_ptr is not None:
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        sums_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * channels + c
        tl.store(sums_ptr, tl.sum(dz, axis=0), mask=exists)
