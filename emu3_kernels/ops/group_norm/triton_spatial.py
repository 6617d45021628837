"""The sums of a spatial norm's backward pass in Triton, over the pixels of a latent's position.

P positions of the latent, L its channels. A position has the sums of d, the gradient of the input
of SiLU, and of d * normed: every gradient but dx follows from them at the resolution of the latent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm.triton_apply import (
    load_channels,
    modulation,
    resize_args,
    silu_derivative,
)
from emu3_kernels.ops.group_norm.triton_statistics import ELEMENTS, part_length, pixel_tile
from emu3_kernels.runtime.launch import cdiv, launch, next_power_of_2, tile


def position_sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    latent: Tensor, table: Tensor, silu: bool,
) -> Tensor:  # fmt: skip
    """Return ``[B, P, 2, C]`` float32."""
    batch, channels = x.shape[0], x.shape[-1]
    num_positions = latent[0, ..., 0].numel()
    # No more rows than pixels that read a position.
    rows = min(next_power_of_2(cdiv(x[0, ..., 0].numel(), num_positions)), 16)
    block = min(next_power_of_2(channels), ELEMENTS // rows)
    sums = x.new_empty(batch, num_positions, 2, channels, dtype=torch.float32)
    grid = num_positions, cdiv(channels, block), batch
    launch(
        spatial_norm_silu_bwd_sums_kernel, grid,
        dy, x, mean, rstd, weight, bias, latent, table, sums,
        *resize_args(x, latent), channels, WIDTH=latent.shape[-1], SILU=silu,
        **tile(num_warps=4, ROWS=rows, BLOCK=block),
    )  # fmt: skip
    return sums


def weighted_sums(sums: Tensor, latent: Tensor, table: Tensor, of_norm: bool) -> Tensor:
    """Return ``[B, 1 or L + 1, parts, 2, C]``: weighted sums over all positions, in parts.

    The weight is y for the gradient of the norm; otherwise each channel of the latent, and 1 last.
    """
    batch, num_positions, _, channels = sums.shape
    width = latent.shape[-1]
    num_weights = 1 if of_norm else width + 1
    options = pixel_tile(channels)
    part = part_length(num_positions, channels)
    num_parts = cdiv(num_positions, part)
    out = sums.new_empty(batch, num_weights, num_parts, 2, channels)
    grid = num_parts, cdiv(channels, options["BLOCK"]), batch * num_weights
    launch(
        spatial_norm_silu_bwd_reduce_kernel, grid,
        sums, latent, table, out, num_positions, channels,
        part, WIDTH=width, OF_NORM=of_norm, **options,
    )  # fmt: skip
    return out


def latent_gradient(
    sums: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, table: Tensor
) -> Tensor:
    batch, num_positions, _, channels = sums.shape
    dlatent = torch.empty_like(latent)
    options = tile(num_warps=4, ROWS=16, BLOCK=min(next_power_of_2(channels), 128))
    grid = cdiv(num_positions, options["ROWS"]), latent.shape[-1], batch
    launch(
        spatial_norm_silu_bwd_latent_kernel, grid,
        sums, weight, bias, table, dlatent, num_positions,
        channels, WIDTH=latent.shape[-1], **options,
    )  # fmt: skip
    return dlatent


@triton.jit
def _first_pixel(position, ratio, num_pixels):
    """The first pixel that reads ``position`` or a later one; rounding moves it by one at most."""
    pixel = tl.maximum((position.to(tl.float32) / ratio).to(tl.int32) - 2, 0)
    for _ in tl.static_range(4):
        reads = (pixel.to(tl.float32) * ratio).to(tl.int32)
        pixel += tl.where((reads < position) & (pixel < num_pixels), 1, 0)
    return tl.minimum(pixel, num_pixels)


@triton.jit
def _pixel_range(position, size, ratio, num_pixels):
    """The pixels of an axis that read ``position``: the first, and how many."""
    first = _first_pixel(position, ratio, num_pixels)
    end = _first_pixel(position + 1, ratio, num_pixels)
    return first, tl.where(position + 1 == size, num_pixels, end) - first


@triton.jit
def spatial_norm_silu_bwd_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, sums_ptr,
    num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    channels, WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of d and of d * normed over the pixels that read one position."""
    image = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = position // columns
    first_t, num_t = _pixel_range(line // rows, frames, frame_ratio, num_frames)
    first_h, num_h = _pixel_range(line % rows, rows, row_ratio, height)
    first_w, num_w = _pixel_range(position % columns, columns, column_ratio, width)
    mean = load_channels(mean_ptr + image * channels, c, channels)[None, :]
    rstd = load_channels(rstd_ptr + image * channels, c, channels)[None, :]
    weight = load_channels(weight_ptr, c, channels)[None, :]
    bias = load_channels(bias_ptr, c, channels)[None, :]
    latent_ptr += image * frames * rows * columns * WIDTH
    here = position + tl.zeros([1], tl.int32)
    y, b = modulation(latent_ptr, table_ptr, here, c, channels, WIDTH)
    sum_d = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_d_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    x_ptr += image * num_frames * height * width * channels
    dy_ptr += image * num_frames * height * width * channels
    num = num_t * num_h * num_w
    for row in range(0, num, ROWS):
        i = row + tl.arange(0, ROWS)
        j = i // tl.maximum(num_w, 1)
        h = first_h + j % tl.maximum(num_h, 1)
        t = first_t + j // tl.maximum(num_h, 1)
        pixel = (t * height + h) * width + first_w + i % tl.maximum(num_w, 1)
        at = pixel.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (i < num)[:, None] & (c < channels)[None, :]
        d = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        if SILU:
            d = d * silu_derivative((normed * weight + bias) * y + b)
        sum_d += d
        sum_d_normed += d * normed
    out = (image * tl.num_programs(0) + position) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(sum_d, axis=0), mask=c < channels)
    tl.store(sums_ptr + out + channels, tl.sum(sum_d_normed, axis=0), mask=c < channels)


@triton.jit
def spatial_norm_silu_bwd_reduce_kernel(
    sums_ptr, latent_ptr, table_ptr, out_ptr, num_positions, channels, part, WIDTH: tl.constexpr,
    OF_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the positions, weighted by y, or by a channel of the latent or 1."""
    num_weights = 1 if OF_NORM else WIDTH + 1
    image = (tl.program_id(2) // num_weights).to(tl.int64)
    i = tl.program_id(2) % num_weights
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, num_positions)
    sums_ptr += image * num_positions * 2 * channels
    latent_ptr += image * num_positions * WIDTH
    sum_d = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_d_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(first, last, ROWS):
        position = row + tl.arange(0, ROWS)
        if OF_NORM:
            valid = tl.minimum(position, num_positions - 1)
            factor, _ = modulation(latent_ptr, table_ptr, valid, c, channels, WIDTH)
        else:
            at = latent_ptr + position * WIDTH + i
            used = (position < last) & (i < WIDTH)
            factor = tl.load(at, mask=used, other=1).to(tl.float32)[:, None]
        inside = (position < last)[:, None] & (c < channels)[None, :]
        at = sums_ptr + position.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        sum_d += factor * tl.load(at, mask=inside, other=0)
        sum_d_normed += factor * tl.load(at + channels, mask=inside, other=0)
    part_id = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    out = out_ptr + part_id * 2 * channels
    tl.store(out + c, tl.sum(sum_d, axis=0), mask=c < channels)
    tl.store(out + channels + c, tl.sum(sum_d_normed, axis=0), mask=c < channels)


@triton.jit
def spatial_norm_silu_bwd_latent_kernel(
    sums_ptr, weight_ptr, bias_ptr, table_ptr, dlatent_ptr, num_positions, channels,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlatent = dy @ y_weight + db @ b_weight;  dy = weight * sums[1] + bias * sums[0]."""
    image = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = image * num_positions + position
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = (position < num_positions)[:, None] & (c < channels)[None, :]
        at = row[:, None] * 2 * channels + c[None, :]
        db = tl.load(sums_ptr + at, mask=inside, other=0)
        sum_d_normed = tl.load(sums_ptr + at + channels, mask=inside, other=0)
        weight = load_channels(weight_ptr, c, channels)[None, :]
        bias = load_channels(bias_ptr, c, channels)[None, :]
        y = load_channels(table_ptr + i * channels, c, channels)[None, :]
        b = load_channels(table_ptr + (WIDTH + 1 + i) * channels, c, channels)[None, :]
        total += (sum_d_normed * weight + db * bias) * y + db * b
    dlatent = tl.sum(total, axis=1)
    out = dlatent_ptr + row * WIDTH + i
    tl.store(out, dlatent.to(dlatent_ptr.dtype.element_ty), mask=position < num_positions)
