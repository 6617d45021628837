"""What the group norms compute for every pixel in Triton: the norm with SiLU, and dx.

``latent`` is None for the group norm. Otherwise it is ``[B, t, h, w, L]`` beside x ``[B, T, H, W,
C]``. A program merges the statistics and loads the parameters of its channels once, for many lines
of pixels; a pixel's scale and shift are computed from the latent where they are used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm.triton_statistics import (
    Layout,
    by_channel,
    channels_of,
    groups_of,
    layout,
    load_channels,
    merge,
)
from emu3_kernels.runtime.launch import (
    INTERPRETED,
    Gpu,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch_planned,
    next_power_of_2,
    plan_launch,
    planned,
)
from emu3_kernels.runtime.triton_silu import silu, silu_derivative

Modulation = tuple[Tensor | None, ...]
"""latent, y_weight, y_bias, b_weight, b_bias."""
NO_MODULATION: Modulation = (None,) * 5


def resize_args(shape: torch.Size, latent: torch.Size) -> tuple[float, ...]:
    """Return T, H, W, then t, h, w, then their ratios."""
    pixels, positions = shape[1:4], latent[1:4]
    return *pixels, *positions, *(p / n for p, n in zip(positions, pixels, strict=True))


def apply(
    x: Tensor, moments: Tensor, stats: Tensor, weight: Tensor, bias: Tensor,
    modulation: Modulation, eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    """Return y; write mean and rstd by channel to ``stats [B, 2, C]``."""
    y = torch.empty_like(x)
    latent = modulation[0]
    latent_shape = None if latent is None else latent.shape
    plan = plan_apply(x.shape, latent_shape, moments.shape[3], eps, silu, gpu_of(x))
    launch_planned(
        group_norm_fwd_kernel, plan, x, y, moments, stats, weight, bias, *modulation
    )  # fmt: skip
    return y


@planned
def plan_apply(
    shape: torch.Size, latent: torch.Size | None, groups: int, eps: float, silu: bool, gpu: Gpu
) -> LaunchPlan:
    parted = layout(shape, groups, gpu)
    rows, num_parts = parted.constants["ROWS"], parted.num_parts
    grid, sizes, constants = _lines(shape, latent, parted, rows, gpu)
    return plan_launch(
        grid, parted.part, num_parts, eps, *sizes,
        SILU=silu, PARTS=next_power_of_2(num_parts), **constants,
    )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, stats: Tensor, terms: Tensor, weight: Tensor, bias: Tensor,
    modulation: Modulation, silu: bool,
) -> Tensor:  # fmt: skip
    """Return dx; ``terms [B, 2, parts, G]`` are sums of weight * d and weight * d * normed."""
    dx = torch.empty_like(x)
    latent = modulation[0]
    latent_shape = None if latent is None else latent.shape
    plan = plan_backward(x.shape, latent_shape, terms.shape, silu, gpu_of(x))
    launch_planned(
        group_norm_bwd_x_kernel, plan, dy, x, dx, stats, terms, weight, bias, *modulation
    )  # fmt: skip
    return dx


@planned
def plan_backward(
    shape: torch.Size, latent: torch.Size | None, terms: torch.Size, silu: bool, gpu: Gpu
) -> LaunchPlan:
    _, _, num_parts, groups = terms
    parted = layout(shape, groups, gpu)
    # dx has twice the numbers of a pixel that y has.
    rows = parted.constants["ROWS"] if latent is None else parted.constants["ROWS"] // 2
    grid, sizes, constants = _lines(shape, latent, parted, max(rows, 1), gpu)
    return plan_launch(
        grid, num_parts, *sizes, SILU=silu, PARTS=next_power_of_2(num_parts), **constants
    )  # fmt: skip


def _lines(
    shape: torch.Size, latent: torch.Size | None, parted: Layout, rows: int, gpu: Gpu
) -> tuple[tuple[int, int, int], tuple[float, ...], dict[str, int | bool]]:
    """Return the grid, the pixels and positions, and the constants of a launch.

    A program has a tile of every n-th line; as many programs run as are resident. Lines are rows
    of an image; without a latent they are tiles of any pixels.
    """
    batch, num_pixels = shape[0], parted.num_pixels
    if INTERPRETED:
        rows *= 16  # little but the number of operations takes time
    if latent is None:
        width, lines = rows, cdiv(num_pixels, rows)
        sizes = (num_pixels, 1, lines, width, 1, 1, 1, 1.0, 1.0, 1.0)
        constants, resident = {"LATENT": 0, "VIDEO": False, "PER": 1}, 4
    else:
        frames, height, width = shape[1:4]
        lines = frames * height
        sizes = num_pixels, *resize_args(shape, latent)
        constants = {"LATENT": latent[4], "VIDEO": frames > 1}
        constants["PER"] = _pixels_of_position(width, latent[3], rows)
        resident = 4 if constants["PER"] > 1 else 2
    tiles = cdiv(width, rows)
    every = min(max(resident * gpu.num_sms // (tiles * parted.blocks * batch), 1), lines)
    constants = parted.constants | constants | {"ROWS": rows}
    return (tiles * every, parted.blocks, batch), sizes, constants


def _pixels_of_position(width: int, columns: int, rows: int) -> int:
    """Return how many neighbours of a line read one position, a power of two; 1 if it varies."""
    ratio = width // columns
    is_even = ratio * columns == width and ratio & (ratio - 1) == 0
    return min(ratio, 8, rows) if is_even else 1


@triton.jit
def nearest(pixel, size, ratio):
    """The position that F.interpolate(mode="nearest") copies to a pixel, in its own float32."""
    pixel += tl.zeros([], tl.int32)  # interpreted, a number of a loop is an int of Python
    return tl.minimum((pixel.to(tl.float32) * ratio).to(tl.int32), size - 1)


@triton.jit
def tile_of(first, columns, ratio, PER: tl.constexpr, ROWS: tl.constexpr):
    """The pixels of a tile of a line, ``[PER, P, 1]``, and their P columns of the latent.

    PER neighbours read one column. They come first: a thread has some of them, and one column.
    """
    column = first + tl.arange(0, ROWS // PER) * PER
    w = column[None, :] + tl.arange(0, PER)[:, None]
    return w[:, :, None], nearest(column, columns, ratio)


@triton.jit
def load_columns(matrix_ptr, bias_ptr, c, exists, LATENT: tl.constexpr):
    """The columns of ``[C, L]``, then the bias: L + 1 rows ``[1, BLOCK]``."""
    columns = ()
    if LATENT > 0:
        for i in tl.static_range(LATENT):
            columns += (load_channels(matrix_ptr + i, c * LATENT, exists)[None, :],)
        columns += (load_channels(bias_ptr, c, exists)[None, :],)
    return columns


@triton.jit
def modulation(latent_ptr, position, y_columns, b_columns, LATENT: tl.constexpr):
    """y and b of each position, ``[P, BLOCK]``: the latent there by the columns of two matrices."""
    y, b = y_columns[LATENT], b_columns[LATENT]
    for i in tl.static_range(LATENT):
        z = tl.load(latent_ptr + position * LATENT + i).to(tl.float32)[:, None]
        y = y + z * y_columns[i]
        b = b + z * b_columns[i]
    return y, b


@triton.jit
def line_position(line, height, frames, rows, columns, frame_ratio, row_ratio, VIDEO: tl.constexpr):
    """The first position of the row of the latent that a line of pixels reads."""
    frame = 0
    if VIDEO:
        frame, line = nearest(line // height, frames, frame_ratio), line % height
    return (frame * rows + nearest(line, rows, row_ratio)) * columns


@triton.jit
def group_norm_fwd_kernel(
    x_ptr, y_ptr, moments_ptr, stats_ptr, weight_ptr, bias_ptr, latent_ptr, y_weight_ptr,
    y_bias_ptr, b_weight_ptr, b_bias_ptr, part, num_parts, eps, num_pixels, num_frames, height,
    width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    SILU: tl.constexpr, LATENT: tl.constexpr, VIDEO: tl.constexpr, PER: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * scale + shift); the first program stores mean and rstd."""
    image, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c, exists = channels_of(block, CHANNELS, SIZE, WIDE, GROUPS)
    moments_ptr += image * 2 * num_parts * (CHANNELS // SIZE)
    mean_g, rstd_g = merge(
        moments_ptr, block, num_pixels, part, num_parts, eps, CHANNELS, SIZE, GROUPS, PARTS
    )
    mean_c, rstd_c = by_channel(mean_g, WIDE, GROUPS), by_channel(rstd_g, WIDE, GROUPS)
    if tl.program_id(0) == 0:
        at = image * 2 * CHANNELS + c
        tl.store(stats_ptr + at, mean_c, mask=exists)
        tl.store(stats_ptr + at + CHANNELS, rstd_c, mask=exists)
    mean = mean_c[None, None, :]
    scale = (rstd_c * load_channels(weight_ptr, c, exists))[None, None, :]
    shift = load_channels(bias_ptr, c, exists)[None, None, :]
    y_columns = load_columns(y_weight_ptr, y_bias_ptr, c, exists, LATENT)
    b_columns = load_columns(b_weight_ptr, b_bias_ptr, c, exists, LATENT)
    tiles = tl.cdiv(width, ROWS)
    every = tl.num_programs(0) // tiles
    w, column = tile_of(tl.program_id(0) % tiles * ROWS, columns, column_ratio, PER, ROWS)
    at = w * CHANNELS + c[None, None, :]
    in_line = (w < width) & exists[None, None, :]
    latent_ptr_of = latent_ptr
    if LATENT > 0:
        latent_ptr_of = latent_ptr + image * frames * rows * columns * LATENT
    lines = num_frames * height
    first = tl.program_id(0) // tiles
    inside = in_line & (first * width + w < num_pixels)
    x = tl.load(x_ptr + (image * num_pixels + first * width) * CHANNELS + at, mask=inside, other=0)
    for line in range(first, lines, every):
        after = line + every
        inside = in_line & (line * width + w < num_pixels)
        more = in_line & (after < lines) & (after * width + w < num_pixels)
        base = (image * num_pixels + after * width) * CHANNELS
        ahead = tl.load(x_ptr + base + at, mask=more, other=0)
        y = (x.to(tl.float32) - mean) * scale + shift
        if LATENT > 0:
            position = line_position(
                line, height, frames, rows, columns, frame_ratio, row_ratio, VIDEO
            )
            factor, term = modulation(
                latent_ptr_of, position + column, y_columns, b_columns, LATENT
            )
            y = y * factor[None, :, :] + term[None, :, :]
        if SILU:
            y = silu(y)
        out = y_ptr + (image * num_pixels + line * width) * CHANNELS + at
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)
        x = ahead


@triton.jit
def load_terms(
    terms_ptr, block, num_parts, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of both terms over the parts, by channel."""
    p = tl.arange(0, PARTS)
    g, exists = groups_of(block, CHANNELS, SIZE, GROUPS)
    inside = (p < num_parts)[:, None] & exists[None, :]
    at = p[:, None] * (CHANNELS // SIZE) + g[None, :]
    first = tl.sum(tl.load(terms_ptr + at, mask=inside, other=0), axis=0)
    at += num_parts * (CHANNELS // SIZE)
    second = tl.sum(tl.load(terms_ptr + at, mask=inside, other=0), axis=0)
    return by_channel(first, WIDE, GROUPS), by_channel(second, WIDE, GROUPS)


@triton.jit
def group_norm_bwd_x_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, terms_ptr, weight_ptr, bias_ptr, latent_ptr, y_weight_ptr,
    y_bias_ptr, b_weight_ptr, b_bias_ptr, num_parts, num_pixels, num_frames, height, width,
    frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    SILU: tl.constexpr, LATENT: tl.constexpr, VIDEO: tl.constexpr, PER: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (d * weight * y - c0 - normed * c1);  d = dy * silu'(...)."""
    image, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c, exists = channels_of(block, CHANNELS, SIZE, WIDE, GROUPS)
    terms_ptr += image * 2 * num_parts * (CHANNELS // SIZE)
    sum0, sum1 = load_terms(terms_ptr, block, num_parts, CHANNELS, SIZE, WIDE, GROUPS, PARTS)
    stats_ptr += image * 2 * CHANNELS
    mean = load_channels(stats_ptr, c, exists)[None, None, :]
    rstd = load_channels(stats_ptr + CHANNELS, c, exists)[None, None, :]
    weight = load_channels(weight_ptr, c, exists)[None, None, :]
    shift = load_channels(bias_ptr, c, exists)[None, None, :]
    c0 = rstd * (sum0 / num_pixels / SIZE)[None, None, :]
    c1 = rstd * (sum1 / num_pixels / SIZE)[None, None, :]
    y_columns = load_columns(y_weight_ptr, y_bias_ptr, c, exists, LATENT)
    b_columns = load_columns(b_weight_ptr, b_bias_ptr, c, exists, LATENT)
    tiles = tl.cdiv(width, ROWS)
    every = tl.num_programs(0) // tiles
    w, column = tile_of(tl.program_id(0) % tiles * ROWS, columns, column_ratio, PER, ROWS)
    at = w * CHANNELS + c[None, None, :]
    in_line = (w < width) & exists[None, None, :]
    latent_ptr_of = latent_ptr
    if LATENT > 0:
        latent_ptr_of = latent_ptr + image * frames * rows * columns * LATENT
    for line in range(tl.program_id(0) // tiles, num_frames * height, every):
        inside = in_line & (line * width + w < num_pixels)
        base = (image * num_pixels + line * width) * CHANNELS
        x = tl.load(x_ptr + base + at, mask=inside, other=0).to(tl.float32)
        d = tl.load(dy_ptr + base + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        z = normed * weight + shift
        scale = rstd * weight
        if LATENT > 0:
            position = line_position(
                line, height, frames, rows, columns, frame_ratio, row_ratio, VIDEO
            )
            factor, term = modulation(
                latent_ptr_of, position + column, y_columns, b_columns, LATENT
            )
            z = z * factor[None, :, :] + term[None, :, :]
            scale = scale * factor[None, :, :]
        if SILU:
            d = d * silu_derivative(z)
        dx = d * scale - c0 - normed * c1
        tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
