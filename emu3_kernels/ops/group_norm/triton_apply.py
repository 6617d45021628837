"""What the group norms compute for every pixel in Triton: the norm with SiLU, and dx.

``latent`` is None for the group norm. Otherwise it is ``[B, t, h, w, L]`` beside x ``[B, T, H, W,
C]``, and ``table [2 * (L + 1), C]`` holds the columns of y_weight, y_bias, the columns of b_weight
and b_bias. A pixel's scale and shift are computed from the latent where they are used: L
multiplications of cached numbers are cheaper than two reads.
"""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm.triton_statistics import pixel_tile
from emu3_kernels.runtime.launch import INTERPRETED, cdiv, launch


def resize_args(x: Tensor, latent: Tensor | None) -> tuple[float, ...]:
    """Return T, H, W, then t, h, w, then their ratios; without a latent, of one row of pixels."""
    if latent is None:
        return 1, 1, x.shape[1], 1, 1, 1, 1.0, 1.0, 1.0
    pixels, positions = x.shape[1:4], latent.shape[1:4]
    return *pixels, *positions, *(p / n for p, n in zip(positions, pixels, strict=True))


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, latent: Tensor | None,
    table: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape)
    options = _tile(x.shape[-1])
    launch(
        group_norm_fwd_kernel, _grid(x, options), x, y, mean, rstd, weight, bias, latent, table,
        *resize_args(x, latent), x.shape[-1], WIDTH=_latent_channels(latent), SILU=silu, **options,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    terms: Tensor, latent: Tensor | None, table: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    dx = x.new_empty(x.shape)
    options = _tile(x.shape[-1])
    launch(
        group_norm_bwd_x_kernel, _grid(x, options), dy, x, dx, mean, rstd, weight, bias, terms,
        latent, table, *resize_args(x, latent), x.shape[-1], WIDTH=_latent_channels(latent),
        SILU=silu, **options,
    )  # fmt: skip
    return dx


def _tile(channels: int) -> dict[str, int | bool]:
    options = pixel_tile(channels)
    if INTERPRETED:
        options["ROWS"] *= 16  # little but the number of operations takes time
    return options


def _grid(x: Tensor, options: dict[str, int | bool]) -> tuple[int, int, int]:
    batch, channels = x.shape[0], x.shape[-1]
    num_pixels = x.numel() // (batch * channels)
    return cdiv(num_pixels, options["ROWS"]), cdiv(channels, options["BLOCK"]), batch


def _latent_channels(latent: Tensor | None) -> int:
    return 0 if latent is None else latent.shape[-1]


@triton.jit
def load_channels(ptr, c, channels):
    return tl.load(ptr + c, mask=c < channels, other=0).to(tl.float32)


@triton.jit
def nearest(pixel, size, ratio):
    """The position that F.interpolate(mode="nearest") copies to a pixel, in its own float32."""
    return tl.minimum((pixel.to(tl.float32) * ratio).to(tl.int32), size - 1)


@triton.jit
def silu_derivative(x):
    """sigmoid(x) * (1 + x * sigmoid(-x)): 1 - sigmoid(x) would lose digits where x is large."""
    power = tl.exp(tl.minimum(-x, 80.0))
    sigmoid = 1 / (1 + power)
    return sigmoid * (1 + x * (power * sigmoid))


@triton.jit
def modulation(latent_ptr, table_ptr, position, c, channels, WIDTH: tl.constexpr):
    """y and b of each position, ``[P, BLOCK]``: the latent there by the columns of two tables."""
    b_table_ptr = table_ptr + (WIDTH + 1) * channels
    y = load_channels(table_ptr + WIDTH * channels, c, channels)[None, :]
    b = load_channels(b_table_ptr + WIDTH * channels, c, channels)[None, :]
    for i in tl.static_range(WIDTH):
        z = tl.load(latent_ptr + position * WIDTH + i).to(tl.float32)[:, None]
        y = y + z * load_channels(table_ptr + i * channels, c, channels)[None, :]
        b = b + z * load_channels(b_table_ptr + i * channels, c, channels)[None, :]
    return y, b


@triton.jit
def affine_of(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, image, pixel, c, channels,
    num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """mean, scale and shift, which make the modulated norm (x - mean) * scale + shift; rstd."""
    mean = load_channels(mean_ptr + image * channels, c, channels)[None, :]
    rstd = load_channels(rstd_ptr + image * channels, c, channels)[None, :]
    scale = rstd * load_channels(weight_ptr, c, channels)[None, :]
    shift = load_channels(bias_ptr, c, channels)[None, :]
    if latent_ptr is not None:
        line = pixel // width
        position = nearest(line // height, frames, frame_ratio) * rows
        position = (position + nearest(line % height, rows, row_ratio)) * columns
        position = position + nearest(pixel % width, columns, column_ratio)
        latent_ptr += image * frames * rows * columns * WIDTH
        # Beyond the last pixel, nearest clamps to the last position: no read is out of bounds.
        y, b = modulation(latent_ptr, table_ptr, position, c, channels, WIDTH)
        scale, shift = scale * y, shift * y + b
    return mean, rstd, scale, shift


@triton.jit
def group_norm_fwd_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, num_frames,
    height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * scale + shift)."""
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_pixels = num_frames * height * width
    inside = (pixel < num_pixels)[:, None] & (c < channels)[None, :]
    at = (image * num_pixels + pixel)[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    mean, _, scale, shift = affine_of(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, image, pixel, c, channels,
        num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
        WIDTH,
    )  # fmt: skip
    y = (x - mean) * scale + shift
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_bwd_x_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, terms_ptr, latent_ptr,
    table_ptr, num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio,
    column_ratio, channels, WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = d * scale - c0 - normed * c1;  d = dy * silu'(...)."""
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_pixels = num_frames * height * width
    inside = (pixel < num_pixels)[:, None] & (c < channels)[None, :]
    at = (image * num_pixels + pixel)[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    d = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
    mean, rstd, scale, shift = affine_of(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, image, pixel, c, channels,
        num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
        WIDTH,
    )  # fmt: skip
    if SILU:
        d = d * silu_derivative((x - mean) * scale + shift)
    terms_ptr += image * 2 * channels
    c0 = load_channels(terms_ptr, c, channels)[None, :]
    c1 = load_channels(terms_ptr + channels, c, channels)[None, :]
    dx = d * scale - c0 - (x - mean) * rstd * c1
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
