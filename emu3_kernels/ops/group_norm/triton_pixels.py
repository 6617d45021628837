"""What the group norms do to every pixel in Triton: the norm with SiLU, and the gradient of x.

``latent`` is None for the plain norm. Otherwise it is ``[B, t, h, w, L]`` beside x ``[B, T, H, W,
C]``, and ``table [2 * (L + 1), C]`` holds the columns of y_weight, y_bias, the columns of b_weight
and b_bias. A pixel's scale and shift are computed from the latent where it is used: L products of
numbers that caches hold are cheaper than reading two.
"""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm.triton_statistics import tile_of


def sizes(x: Tensor, latent: Tensor | None) -> tuple[float, ...]:
    """Return T, H, W, then t, h, w, then the ratios: without a latent, of one line of pixels."""
    if latent is None:
        return 1, 1, x.shape[1], 1, 1, 1, 1.0, 1.0, 1.0
    pixels, places = x.shape[1:4], latent.shape[1:4]
    return *pixels, *places, *(p / n for p, n in zip(places, pixels, strict=True))


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, latent: Tensor | None,
    table: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape)
    rows, tile = tile_of(x.shape[-1])
    _apply_kernel[grid_of(x)](
        x, y, mean, rstd, weight, bias, latent, table, *sizes(x, latent), x.shape[-1],
        WIDTH=latent_width(latent), SILU=silu, ROWS=rows, **tile.options(),
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    slopes: Tensor, latent: Tensor | None, table: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    dx = x.new_empty(x.shape)
    rows, tile = tile_of(x.shape[-1])
    _bwd_kernel[grid_of(x)](
        dy, x, dx, mean, rstd, weight, bias, slopes, latent, table, *sizes(x, latent),
        x.shape[-1], WIDTH=latent_width(latent), SILU=silu, ROWS=rows, **tile.options(),
    )  # fmt: skip
    return dx


def grid_of(x: Tensor) -> tuple[int, int, int]:
    rows, tile = tile_of(x.shape[-1])
    num_pixels = x.numel() // (x.shape[0] * x.shape[-1])
    return triton.cdiv(num_pixels, rows), triton.cdiv(x.shape[-1], tile.block), x.shape[0]


def latent_width(latent: Tensor | None) -> int:
    return 0 if latent is None else latent.shape[-1]


@triton.jit
def load_channels(ptr, c, channels):
    return tl.load(ptr + c, mask=c < channels, other=0).to(tl.float32)


@triton.jit
def nearest(pixel, places, ratio):
    """The place that F.interpolate(mode="nearest") shows at a pixel, in its own float32."""
    return tl.minimum((pixel.to(tl.float32) * ratio).to(tl.int32), places - 1)


@triton.jit
def silu_gradient(x):
    """sigmoid(x) * (1 + x * sigmoid(-x)): 1 - sigmoid(x) would lose digits where x is large."""
    power = tl.exp(tl.minimum(-x, 80.0))
    sigmoid = 1 / (1 + power)
    return sigmoid * (1 + x * (power * sigmoid))


@triton.jit
def modulation(latent_ptr, table_ptr, place, c, channels, WIDTH: tl.constexpr):
    """y and b of each place, ``[places, BLOCK]``: the latent there by the columns of two tables."""
    b_table_ptr = table_ptr + (WIDTH + 1) * channels
    y = load_channels(table_ptr + WIDTH * channels, c, channels)[None, :]
    b = load_channels(b_table_ptr + WIDTH * channels, c, channels)[None, :]
    for i in tl.static_range(WIDTH):
        z = tl.load(latent_ptr + place * WIDTH + i).to(tl.float32)[:, None]
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
        place = nearest(line // height, frames, frame_ratio) * rows
        place = (place + nearest(line % height, rows, row_ratio)) * columns
        place = place + nearest(pixel % width, columns, column_ratio)
        latent_ptr += image * frames * rows * columns * WIDTH
        # Past the last pixel, nearest stops at the last place of the frames: nothing is overread.
        y, b = modulation(latent_ptr, table_ptr, place, c, channels, WIDTH)
        scale, shift = scale * y, shift * y + b
    return mean, rstd, scale, shift


@triton.jit
def _apply_kernel(
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
def _bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, slopes_ptr, latent_ptr,
    table_ptr, num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio,
    column_ratio, channels, WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = d * scale - slopes[0] - normed * slopes[1];  d = dy * silu'(...)."""
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
        d = d * silu_gradient((x - mean) * scale + shift)
    slopes_ptr += image * 2 * channels
    level = load_channels(slopes_ptr, c, channels)[None, :]
    rise = load_channels(slopes_ptr + channels, c, channels)[None, :]
    dx = d * scale - level - (x - mean) * rstd * rise
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
