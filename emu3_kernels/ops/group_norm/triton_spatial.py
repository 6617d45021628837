"""The sums of a spatial norm's backward pass in Triton, over the pixels of a latent's position.

P positions of the latent, L its channels. A position has the sums of d, the gradient of the input
of SiLU, and of d * normed: every gradient but dx follows from them at the resolution of the latent.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm.triton_apply import (
    Modulation,
    load_columns,
    modulation,
    resize_args,
)
from emu3_kernels.ops.group_norm.triton_statistics import channels_of, load_channels, store_terms
from emu3_kernels.runtime.launch import (
    INTERPRETED,
    LaunchPlan,
    cdiv,
    launch_planned,
    next_power_of_2,
    plan_launch,
    planned,
    tile,
)
from emu3_kernels.runtime.triton_silu import silu_derivative

MOST_PARTS = 128
"""Of the positions: partial sums are few beside the sums of positions."""


def position_sums(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, modulated: Modulation,
    silu: bool,
) -> Tensor:  # fmt: skip
    """Return ``[B, P, 2, C]`` float32."""
    shape, plan = plan_position_sums(x.shape, modulated[0].shape, silu)
    sums = x.new_empty(*shape, dtype=torch.float32)
    launch_planned(
        spatial_norm_silu_bwd_sums_kernel, plan, dy, x, stats, weight, bias, *modulated, sums
    )  # fmt: skip
    return sums


@planned
def plan_position_sums(
    shape: torch.Size, latent: torch.Size, silu: bool
) -> tuple[tuple[int, ...], LaunchPlan]:
    batch, *pixels, channels = shape
    num_positions = prod(latent[1:4])
    # No more rows than pixels that read a position; interpreted, a tile may have any size.
    most_rows, elements = (1024, 1 << 17) if INTERPRETED else (16, 2048)
    rows = min(next_power_of_2(cdiv(prod(pixels), num_positions)), most_rows)
    block = min(next_power_of_2(channels), elements // rows)
    grid = num_positions, cdiv(channels, block), batch
    plan = plan_launch(
        grid, *resize_args(shape, latent), channels,
        LATENT=latent[4], SILU=silu, **tile(num_warps=4, ROWS=rows, BLOCK=block),
    )  # fmt: skip
    return (batch, num_positions, 2, channels), plan


def weighted_sums(
    sums: Tensor, weight: Tensor, modulated: Modulation, groups: int
) -> tuple[Tensor, Tensor]:
    """Return ``[B, parts, L + 2, 2, C]``, and for dx ``[B, 2, parts, G]``: sums over positions.

    The weights are the channels of the latent, then 1, then y, which makes them sums of the norm.
    The second are those of the norm times ``weight``, summed over each group.
    """
    out_shape, terms_shape, plan = plan_weighted_sums(sums.shape, modulated[0].shape[4], groups)
    out, terms = sums.new_empty(*out_shape), sums.new_empty(*terms_shape)
    launch_planned(
        spatial_norm_silu_bwd_reduce_kernel, plan, sums, weight, *modulated, out, terms
    )  # fmt: skip
    return out, terms


@planned
def plan_weighted_sums(
    sums: torch.Size, latent_channels: int, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...], LaunchPlan]:
    batch, num_positions, _, channels = sums
    num_weights, size = latent_channels + 2, channels // groups
    wide = next_power_of_2(size)
    of_block = min(max(128 // wide, 1), next_power_of_2(groups))
    rows = max(2048 // (of_block * wide), 1)
    part = rows * cdiv(cdiv(num_positions, rows), MOST_PARTS)
    num_parts = cdiv(num_positions, part)
    plan = plan_launch(
        (num_parts, cdiv(groups, of_block), batch * num_weights), num_positions, part,
        LATENT=latent_channels,
        **tile(num_warps=4, CHANNELS=channels, SIZE=size, WIDE=wide, GROUPS=of_block, ROWS=rows),
    )  # fmt: skip
    return (batch, num_parts, num_weights, 2, channels), (batch, 2, num_parts, groups), plan


def parameter_gradients(
    weighted: Tensor, weight: Tensor, bias: Tensor, *matrices: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of weight, bias, y_weight, y_bias, b_weight and b_bias."""
    grads = tuple(map(torch.empty_like, (weight, bias, *matrices)))
    plan = plan_parameter_gradients(weighted.shape)
    launch_planned(spatial_norm_silu_bwd_add_kernel, plan, weighted, weight, bias, *grads)
    return grads


@planned
def plan_parameter_gradients(weighted: torch.Size) -> LaunchPlan:
    batch, num_parts, num_weights, _, channels = weighted
    options = tile(num_warps=4, ROWS=32, BLOCK=64)
    grid = cdiv(channels, options["BLOCK"]), num_weights
    return plan_launch(grid, batch * num_parts, channels, LATENT=num_weights - 2, **options)


def latent_gradient(sums: Tensor, weight: Tensor, bias: Tensor, modulated: Modulation) -> Tensor:
    latent, y_weight, _, b_weight, _ = modulated
    dlatent = torch.empty_like(latent)
    plan = plan_latent_gradient(sums.shape, latent.shape[4])
    launch_planned(
        spatial_norm_silu_bwd_latent_kernel, plan, sums, weight, bias, y_weight, b_weight, dlatent
    )  # fmt: skip
    return dlatent


@planned
def plan_latent_gradient(sums: torch.Size, latent_channels: int) -> LaunchPlan:
    batch, num_positions, _, channels = sums
    options = tile(num_warps=4, ROWS=16, BLOCK=min(next_power_of_2(channels), 128))
    grid = cdiv(num_positions, options["ROWS"]), latent_channels, batch
    return plan_launch(grid, num_positions, channels, LATENT=latent_channels, **options)


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
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, latent_ptr, y_weight_ptr, y_bias_ptr,
    b_weight_ptr, b_bias_ptr, sums_ptr,
    num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    channels, LATENT: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of d and of d * normed over the pixels that read one position."""
    image = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = c < channels
    line = position // columns
    first_t, num_t = _pixel_range(line // rows, frames, frame_ratio, num_frames)
    first_h, num_h = _pixel_range(line % rows, rows, row_ratio, height)
    first_w, num_w = _pixel_range(position % columns, columns, column_ratio, width)
    stats_ptr += image * 2 * channels
    mean = load_channels(stats_ptr, c, exists)[None, :]
    rstd = load_channels(stats_ptr + channels, c, exists)[None, :]
    weight = load_channels(weight_ptr, c, exists)[None, :]
    bias = load_channels(bias_ptr, c, exists)[None, :]
    latent_ptr += image * frames * rows * columns * LATENT
    here = position + tl.zeros([1], tl.int32)
    y_columns = load_columns(y_weight_ptr, y_bias_ptr, c, exists, LATENT)
    b_columns = load_columns(b_weight_ptr, b_bias_ptr, c, exists, LATENT)
    y, b = modulation(latent_ptr, here, y_columns, b_columns, LATENT)
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
        inside = (i < num)[:, None] & exists[None, :]
        d = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        if SILU:
            d = d * silu_derivative((normed * weight + bias) * y + b)
        sum_d += d
        sum_d_normed += d * normed
    out = (image * tl.num_programs(0) + position) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(sum_d, axis=0), mask=exists)
    tl.store(sums_ptr + out + channels, tl.sum(sum_d_normed, axis=0), mask=exists)


@triton.jit
def spatial_norm_silu_bwd_reduce_kernel(
    sums_ptr, weight_ptr, latent_ptr, y_weight_ptr, y_bias_ptr, b_weight_ptr, b_bias_ptr, out_ptr,
    terms_ptr, num_positions, part, LATENT: tl.constexpr, CHANNELS: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the positions, weighted by a channel of the latent, by 1 or by y."""
    image = (tl.program_id(2) // (LATENT + 2)).to(tl.int64)
    i = tl.program_id(2) % (LATENT + 2)
    block = tl.program_id(1)
    c, exists = channels_of(block, CHANNELS, SIZE, WIDE, GROUPS)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, num_positions)
    sums_ptr += image * num_positions * 2 * CHANNELS
    latent_ptr += image * num_positions * LATENT
    y_columns = load_columns(y_weight_ptr, y_bias_ptr, c, exists, LATENT)
    sum_d = tl.zeros([ROWS, GROUPS * WIDE], tl.float32)
    sum_d_normed = tl.zeros([ROWS, GROUPS * WIDE], tl.float32)
    for row in range(first, last, ROWS):
        position = row + tl.arange(0, ROWS)
        inside = (position < last)[:, None] & exists[None, :]
        at = sums_ptr + position.to(tl.int64)[:, None] * (2 * CHANNELS) + c[None, :]
        d = tl.load(at, mask=inside, other=0)
        d_normed = tl.load(at + CHANNELS, mask=inside, other=0)
        if i == LATENT + 1:
            valid = tl.minimum(position, num_positions - 1)
            factor, _ = modulation(latent_ptr, valid, y_columns, y_columns, LATENT)
        else:
            used = (position < last) & (i < LATENT)
            z = tl.load(latent_ptr + position * LATENT + i, mask=used, other=1)
            factor = tl.broadcast_to(z.to(tl.float32)[:, None], [ROWS, GROUPS * WIDE])
        sum_d += factor * d
        sum_d_normed += factor * d_normed
    num_parts = tl.num_programs(0)
    out_ptr += ((image * num_parts + tl.program_id(0)) * (LATENT + 2) + i) * 2 * CHANNELS
    total_d, total_d_normed = tl.sum(sum_d, axis=0), tl.sum(sum_d_normed, axis=0)
    tl.store(out_ptr + c, total_d, mask=exists)
    tl.store(out_ptr + CHANNELS + c, total_d_normed, mask=exists)
    if i == LATENT + 1:
        terms_ptr += image * 2 * num_parts * (CHANNELS // SIZE)
        weight = load_channels(weight_ptr, c, exists)
        store_terms(
            terms_ptr, total_d * weight, total_d_normed * weight, block, tl.program_id(0),
            num_parts, CHANNELS, SIZE, WIDE, GROUPS,
        )  # fmt: skip


@triton.jit
def _add_rows(ptr, stride, num_rows, c, exists, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & exists[None, :]
        at = row.to(tl.int64)[:, None] * stride + c[None, :]
        total += tl.load(ptr + at, mask=inside, other=0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def spatial_norm_silu_bwd_add_kernel(
    sums_ptr, weight_ptr, bias_ptr, dweight_ptr, dbias_ptr, dy_weight_ptr, dy_bias_ptr,
    db_weight_ptr, db_bias_ptr, num_rows, channels,
    LATENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the norm, or of a column of both matrices: weight * sums[1] + bias * sums[0]."""
    i = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = c < channels
    sums_ptr += i * 2 * channels
    stride = (LATENT + 2) * 2 * channels
    db = _add_rows(sums_ptr, stride, num_rows, c, exists, ROWS, BLOCK)
    d_normed = _add_rows(sums_ptr + channels, stride, num_rows, c, exists, ROWS, BLOCK)
    weight = load_channels(weight_ptr, c, exists)
    dy = weight * d_normed + load_channels(bias_ptr, c, exists) * db
    if i < LATENT:
        out = c * LATENT + i
        tl.store(dy_weight_ptr + out, dy.to(dy_weight_ptr.dtype.element_ty), mask=exists)
        tl.store(db_weight_ptr + out, db.to(db_weight_ptr.dtype.element_ty), mask=exists)
    elif i == LATENT:
        tl.store(dy_bias_ptr + c, dy.to(dy_bias_ptr.dtype.element_ty), mask=exists)
        tl.store(db_bias_ptr + c, db.to(db_bias_ptr.dtype.element_ty), mask=exists)
    else:
        tl.store(dweight_ptr + c, d_normed.to(dweight_ptr.dtype.element_ty), mask=exists)
        tl.store(dbias_ptr + c, db.to(dbias_ptr.dtype.element_ty), mask=exists)


@triton.jit
def spatial_norm_silu_bwd_latent_kernel(
    sums_ptr, weight_ptr, bias_ptr, y_weight_ptr, b_weight_ptr, dlatent_ptr, num_positions,
    channels, LATENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlatent = dy @ y_weight + db @ b_weight;  dy = weight * sums[1] + bias * sums[0]."""
    image = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = image * num_positions + position
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        exists = c < channels
        inside = (position < num_positions)[:, None] & exists[None, :]
        at = row[:, None] * 2 * channels + c[None, :]
        db = tl.load(sums_ptr + at, mask=inside, other=0)
        sum_d_normed = tl.load(sums_ptr + at + channels, mask=inside, other=0)
        weight = load_channels(weight_ptr, c, exists)[None, :]
        bias = load_channels(bias_ptr, c, exists)[None, :]
        y = load_channels(y_weight_ptr + i, c * LATENT, exists)[None, :]
        b = load_channels(b_weight_ptr + i, c * LATENT, exists)[None, :]
        total += (sum_d_normed * weight + db * bias) * y + db * b
    dlatent = tl.sum(total, axis=1)
    out = dlatent_ptr + row * LATENT + i
    tl.store(out, dlatent.to(dlatent_ptr.dtype.element_ty), mask=position < num_positions)
