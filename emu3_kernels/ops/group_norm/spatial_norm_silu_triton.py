"""spatial_norm_silu in Triton: the passes of the plain norm; backward, sums of every place first.

P places of the latent, L its channels. The sums of a place, over the pixels that show it, are those
of d, the gradient of what SiLU is applied to, and of d * normed: every gradient but that of x
follows from them at the size of the latent.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm import triton_pixels as pixels
from emu3_kernels.ops.group_norm import triton_statistics as statistics
from emu3_kernels.runtime.launch import (
    Config,
    Contract,
    Tile,
    meta,
    next_power_of_2,
    why_not_triton,
)


def why_not(x: Tensor, latent: Tensor, *parameters: Tensor) -> str | None:
    return next(filter(None, map(why_not_triton, (x, latent, *parameters))), None)


def forward(
    x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor,
    b_weight: Tensor, b_bias: Tensor, groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not x.numel():
        nothing = x.new_empty(x.shape[0], x.shape[-1], dtype=torch.float32)
        return x.new_empty(x.shape), nothing, nothing
    table = table_of(y_weight, y_bias, b_weight, b_bias)
    mean, rstd = statistics.statistics(x.flatten(1, 3), groups, eps)
    return pixels.apply(x, mean, rstd, weight, bias, latent, table, silu), mean, rstd


def table_of(y_weight: Tensor, y_bias: Tensor, b_weight: Tensor, b_bias: Tensor) -> Tensor:
    """Lay the columns out as rows, ``[2 * (L + 1), C]``, so that channels are neighbours."""
    return torch.cat([y_weight.T, y_bias[None], b_weight.T, b_bias[None]])


def backward(
    dy: Tensor, x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor,
    y_bias: Tensor, b_weight: Tensor, b_bias: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = weight, bias, y_weight, y_bias, b_weight, b_bias
    if not x.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (x, latent, *parameters))
    table = table_of(y_weight, y_bias, b_weight, b_bias)
    norm = mean, rstd, weight, bias
    sums = _place_sums(dy, x, *norm, latent, table, silu)
    dlatent = _latent_gradient(sums, latent, weight, bias, table)
    of_norm = _weighted_sums(sums, latent, table, of_norm=True)[:, 0]
    totals, slopes = statistics.slopes(of_norm, rstd, weight, groups, x[0, ..., 0].numel())
    dx = pixels.backward(dy, x, *norm, slopes, latent, table, silu)
    dbias, dweight = totals.sum(0)
    db, times_normed = _weighted_sums(sums, latent, table, of_norm=False).sum((0, 2)).unbind(1)
    dy_table = weight.float() * times_normed + bias.float() * db
    gradients = dweight, dbias, dy_table[:-1].T, dy_table[-1], db[:-1].T, db[-1]
    cast = (g.to(p.dtype).contiguous() for g, p in zip(gradients, parameters, strict=True))
    return dx, dlatent, *cast


def _place_sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    latent: Tensor, table: Tensor, silu: bool,
) -> Tensor:  # fmt: skip
    """Return ``[B, P, 2, C]`` float32. A tile has no more rows than a place is shown by pixels."""
    batch, channels = x.shape[0], x.shape[-1]
    num_places = latent[0, ..., 0].numel()
    rows = min(next_power_of_2(triton.cdiv(x[0, ..., 0].numel(), num_places)), 16)
    tile = Tile(block=min(next_power_of_2(channels), statistics.ELEMENTS // rows), num_warps=4)
    sums = x.new_empty(batch, num_places, 2, channels, dtype=torch.float32)
    _place_sums_kernel[(num_places, triton.cdiv(channels, tile.block), batch)](
        dy, x, mean, rstd, weight, bias, latent, table, sums, *pixels.sizes(x, latent), channels,
        WIDTH=latent.shape[-1], SILU=silu, ROWS=rows, **tile.options(),
    )  # fmt: skip
    return sums


def _weighted_sums(sums: Tensor, latent: Tensor, table: Tensor, of_norm: bool) -> Tensor:
    """Return ``[B, 1 or L + 1, parts, 2, C]``: parts of the sums over all places, each weighted.

    By y for the gradient of the norm; otherwise by each channel of the latent, and in the end by 1.
    """
    batch, num_places, _, channels = sums.shape
    width = latent.shape[-1]
    num_weights = 1 if of_norm else width + 1
    rows, tile = statistics.tile_of(channels)
    part = statistics.parts_of(num_places, channels)
    num_parts = triton.cdiv(num_places, part)
    out = sums.new_empty(batch, num_weights, num_parts, 2, channels)
    _weighted_sums_kernel[(num_parts, triton.cdiv(channels, tile.block), batch * num_weights)](
        sums, latent, table, out, num_places, channels, part, WIDTH=width, OF_NORM=of_norm,
        ROWS=rows, **tile.options(),
    )  # fmt: skip
    return out


def _latent_gradient(
    sums: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, table: Tensor
) -> Tensor:
    batch, num_places, _, channels = sums.shape
    dlatent = torch.empty_like(latent)
    tile = Tile(block=min(next_power_of_2(channels), 128), num_warps=4)
    rows = 16
    _latent_kernel[(triton.cdiv(num_places, rows), latent.shape[-1], batch)](
        sums, weight, bias, table, dlatent, num_places, channels, WIDTH=latent.shape[-1],
        ROWS=rows, **tile.options(),
    )  # fmt: skip
    return dlatent


@triton.jit
def _first_pixel(place, ratio, num_pixels):
    """The first pixel that shows ``place`` or a later one: rounding moves it by one at most."""
    pixel = tl.maximum((place.to(tl.float32) / ratio).to(tl.int32) - 2, 0)
    for _ in tl.static_range(4):
        shown = (pixel.to(tl.float32) * ratio).to(tl.int32)
        pixel += tl.where((shown < place) & (pixel < num_pixels), 1, 0)
    return tl.minimum(pixel, num_pixels)


@triton.jit
def _span(place, places, ratio, num_pixels):
    """The pixels of an axis that show ``place``: the first, and how many."""
    first = _first_pixel(place, ratio, num_pixels)
    end = _first_pixel(place + 1, ratio, num_pixels)
    return first, tl.where(place + 1 == places, num_pixels, end) - first


@triton.jit
def _place_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, latent_ptr, table_ptr, sums_ptr,
    num_frames, height, width, frames, rows, columns, frame_ratio, row_ratio, column_ratio,
    channels, WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of d and of d * normed over the pixels that show one place."""
    image = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = place // columns
    first_t, num_t = _span(line // rows, frames, frame_ratio, num_frames)
    first_h, num_h = _span(line % rows, rows, row_ratio, height)
    first_w, num_w = _span(place % columns, columns, column_ratio, width)
    mean = pixels.load_channels(mean_ptr + image * channels, c, channels)[None, :]
    rstd = pixels.load_channels(rstd_ptr + image * channels, c, channels)[None, :]
    weight = pixels.load_channels(weight_ptr, c, channels)[None, :]
    bias = pixels.load_channels(bias_ptr, c, channels)[None, :]
    latent_ptr += image * frames * rows * columns * WIDTH
    here = place + tl.zeros([1], tl.int32)
    y, b = pixels.modulation(latent_ptr, table_ptr, here, c, channels, WIDTH)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    times_normed = tl.zeros([ROWS, BLOCK], tl.float32)
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
            d = d * pixels.silu_gradient((normed * weight + bias) * y + b)
        plain += d
        times_normed += d * normed
    out = (image * tl.num_programs(0) + place) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(plain, axis=0), mask=c < channels)
    tl.store(sums_ptr + out + channels, tl.sum(times_normed, axis=0), mask=c < channels)


@triton.jit
def _weighted_sums_kernel(
    sums_ptr, latent_ptr, table_ptr, out_ptr, num_places, channels, part, WIDTH: tl.constexpr,
    OF_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the places, weighted by y, or by a channel of the latent or 1."""
    num_weights = 1 if OF_NORM else WIDTH + 1
    image = (tl.program_id(2) // num_weights).to(tl.int64)
    i = tl.program_id(2) % num_weights
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, num_places)
    sums_ptr += image * num_places * 2 * channels
    latent_ptr += image * num_places * WIDTH
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    times_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(first, last, ROWS):
        place = row + tl.arange(0, ROWS)
        if OF_NORM:
            known = tl.minimum(place, num_places - 1)
            factor, _ = pixels.modulation(latent_ptr, table_ptr, known, c, channels, WIDTH)
        else:
            at = latent_ptr + place * WIDTH + i
            factor = tl.load(at, mask=(place < last) & (i < WIDTH), other=1).to(tl.float32)[:, None]
        inside = (place < last)[:, None] & (c < channels)[None, :]
        at = sums_ptr + place.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        plain += factor * tl.load(at, mask=inside, other=0)
        times_normed += factor * tl.load(at + channels, mask=inside, other=0)
    part_id = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    out = out_ptr + part_id * 2 * channels
    tl.store(out + c, tl.sum(plain, axis=0), mask=c < channels)
    tl.store(out + channels + c, tl.sum(times_normed, axis=0), mask=c < channels)


@triton.jit
def _latent_kernel(
    sums_ptr, weight_ptr, bias_ptr, table_ptr, dlatent_ptr, num_places, channels,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlatent = dy @ y_weight + db @ b_weight;  dy = weight * sums[1] + bias * sums[0]."""
    image = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = image * num_places + place
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = (place < num_places)[:, None] & (c < channels)[None, :]
        at = row[:, None] * 2 * channels + c[None, :]
        db = tl.load(sums_ptr + at, mask=inside, other=0)
        times_normed = tl.load(sums_ptr + at + channels, mask=inside, other=0)
        weight = pixels.load_channels(weight_ptr, c, channels)[None, :]
        bias = pixels.load_channels(bias_ptr, c, channels)[None, :]
        y = pixels.load_channels(table_ptr + i * channels, c, channels)[None, :]
        b = pixels.load_channels(table_ptr + (WIDTH + 1 + i) * channels, c, channels)[None, :]
        total += (times_normed * weight + db * bias) * y + db * b
    dlatent = tl.sum(total, axis=1)
    out = dlatent_ptr + row * WIDTH + i
    tl.store(out, dlatent.to(dlatent_ptr.dtype.element_ty), mask=place < num_places)


def _parameters(channels: int) -> tuple[Tensor, ...]:
    vector, matrix = meta(channels), meta(channels, 4)
    return vector, vector, matrix, vector, matrix, vector


def _run_forward(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    forward(x, latent, *_parameters(channels), 32, 1e-6, True)


def _run_backward(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    of_group = (meta(1, channels, dtype=torch.float32) for _ in range(2))
    backward(x, x, latent, *_parameters(channels), *of_group, 32, True)


# Scalars are the channels' numbers, one a thread, and beside each of them the latent's four of all
# 16 pixels of a tile: 64, which every thread of a warp reads together. 168 registers keep 12 warps.
FORWARD = statistics.FORWARD | {"_apply_kernel": Contract(max_registers=128, scalar_loads=78)}
BACKWARD = statistics.BACKWARD | {
    "_place_sums_kernel": Contract(max_registers=168, scalar_loads=18, scalar_stores=2),
    "_weighted_sums_kernel": Contract(max_registers=128, scalar_loads=69, scalar_stores=2),
    "_latent_kernel": Contract(max_registers=128, scalar_loads=4, scalar_stores=1),
    "_bwd_kernel": Contract(max_registers=168, scalar_loads=80),
}
CONFIGS = tuple(
    Config(f"{side} x {side} x {channels}{way}", partial(run, side, channels), contracts)
    for side, channels in ((512, 256), (64, 1024))
    for way, run, contracts in (("", _run_forward, FORWARD), (", back", _run_backward, BACKWARD))
)
