"""Statistics of groups in Triton, and what they give back to the gradient.

Every array by channel is ``[B, C]`` float32, with the number of a group at each of its channels, so
that it is read 16 bytes at a time. An image is summed in parts of whole tiles, ROWS pixels by
BLOCK channels; W = C / G channels a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import Contract, Tile, next_power_of_2

ELEMENTS = 2048
"""Of a tile: 16 a thread with 4 warps of 32 lanes."""

# 128 registers keep 16 warps on a multiprocessor. Sums leave, channels come, one a thread: little
# beside the pixels. The numbers of a group are rows of its 4 to 32 channels, so that none is wide.
FORWARD = {
    "_moments_kernel": Contract(max_registers=128, scalar_stores=2),
    "_statistics_kernel": Contract(max_registers=128, access_bytes=4),
}
BACKWARD = {"_slopes_kernel": Contract(max_registers=128, access_bytes=2)}


def tile_of(channels: int) -> tuple[int, Tile]:
    """Return the pixels of a tile, and the tile: at most 128 channels, 256 bytes of bfloat16."""
    block = min(next_power_of_2(channels), 128)
    return ELEMENTS // block, Tile(block=block, num_warps=4)


def parts_of(num_pixels: int, channels: int) -> int:
    """Return the pixels of a part: 512 parts in all if each has 4 to 32 tiles."""
    rows, tile = tile_of(channels)
    num_tiles = triton.cdiv(num_pixels, rows) * triton.cdiv(channels, tile.block)
    return rows * min(max(triton.cdiv(num_tiles, 512), 4), 32)


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of ``x [B, S, C]``, which is not empty."""
    batch, num_pixels, channels = x.shape
    rows, tile = tile_of(channels)
    part = parts_of(num_pixels, channels)
    num_parts = triton.cdiv(num_pixels, part)
    moments = x.new_empty(batch, num_parts, 2, channels, dtype=torch.float32)
    _moments_kernel[(num_parts, triton.cdiv(channels, tile.block), batch)](
        x, moments, num_pixels, channels, part, ROWS=rows, **tile.options()
    )
    mean, rstd = x.new_empty(2, batch, channels, dtype=torch.float32)
    width, few = group_tile(channels // groups)
    _statistics_kernel[(groups, batch)](
        moments, mean, rstd, num_pixels, channels, channels // groups, part, num_parts, eps,
        ROWS=width, **few.options(),
    )  # fmt: skip
    return mean, rstd


def slopes(sums: Tensor, rstd: Tensor, weight: Tensor, groups: int, num_pixels: int) -> Tensor:
    """Return ``[2, B, 2, C]``: of each image, totals of ``sums``, and slopes.

    ``sums [B, parts, 2, C]`` are those of the gradient of the norm and of it times the normed x:
    the gradients of bias and weight. With slopes, dx = d * scale - slopes[0] - normed * slopes[1].
    """
    batch, num_parts, _, channels = sums.shape
    out = sums.new_empty(2, batch, 2, channels)
    rows, few = group_tile(channels // groups)
    _slopes_kernel[(groups, batch)](
        sums, rstd, weight, out[0], out[1], num_pixels, channels, channels // groups, num_parts,
        ROWS=rows, **few.options(),
    )  # fmt: skip
    return out


def group_tile(width: int) -> tuple[int, Tile]:
    """Return how many parts a program holds at once of a group of ``width`` channels."""
    block = next_power_of_2(width)
    return max(ELEMENTS // block, 1), Tile(block=block, num_warps=4)


@triton.jit
def _moments_kernel(
    x_ptr, moments_ptr, num_pixels, channels, part, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Welford's mean and squared deviations of every place of a tile, then of the part (Chan)."""
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * part
    num = tl.minimum(num_pixels - first, part)
    x_ptr += (image * num_pixels + first) * channels
    r = tl.arange(0, ROWS)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    deviations = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num, ROWS):
        inside = (row + r < num)[:, None] & (c < channels)[None, :]
        offsets = (row + r).to(tl.int64)[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
        share = 1.0 / (row // ROWS + 1)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * share
        deviations += delta * delta * (1 - share)
    seen = tl.maximum((num - r + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    # A mean of differences: a sum of large means would lose the digits that they share.
    pivot = tl.sum(tl.where(r[:, None] == 0, mean, 0.0), axis=0)
    centre = pivot + tl.sum((mean - pivot[None, :]) * seen, axis=0) / num
    delta = tl.where(seen > 0, mean - centre[None, :], 0.0)
    spread = tl.sum(deviations + seen * delta * delta, axis=0)
    out = moments_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(out, centre, mask=c < channels)
    tl.store(out + channels, spread, mask=c < channels)


@triton.jit
def _statistics_kernel(
    moments_ptr, mean_ptr, rstd_ptr, num_pixels, channels, width, part, num_parts, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group, from the moments of its channels in every part (Chan)."""
    image = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK)
    c = tl.program_id(0) * width + k
    r = tl.arange(0, ROWS)
    moments_ptr += image * num_parts * 2 * channels
    pivot = tl.load(moments_ptr + tl.program_id(0) * width)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < width)[None, :]
        offsets = (row + r)[:, None] * 2 * channels + c[None, :]
        seen = tl.minimum(num_pixels - (row + r) * part, part).to(tl.float32) / num_pixels
        delta = tl.load(moments_ptr + offsets, mask=inside, other=0) - pivot
        total += tl.where(inside, delta * seen[:, None], 0.0)
    mean = pivot + tl.sum(total) / width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < width)[None, :]
        offsets = (row + r)[:, None] * 2 * channels + c[None, :]
        seen = tl.minimum(num_pixels - (row + r) * part, part).to(tl.float32)
        delta = tl.load(moments_ptr + offsets, mask=inside, other=0) - mean
        spread = tl.load(moments_ptr + offsets + channels, mask=inside, other=0)
        total += tl.where(inside, spread + seen[:, None] * delta * delta, 0.0)
    variance = tl.sum(total) / num_pixels / width
    rstd = tl.rsqrt(variance + eps)
    out = image * channels + c
    tl.store(mean_ptr + out, mean + tl.zeros([BLOCK], tl.float32), mask=k < width)
    tl.store(rstd_ptr + out, rstd + tl.zeros([BLOCK], tl.float32), mask=k < width)


@triton.jit
def _slopes_kernel(
    sums_ptr, rstd_ptr, weight_ptr, totals_ptr, slopes_ptr, num_pixels, channels, width, num_parts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Totals of a group's sums, and its slopes: rstd * mean(weight * total) of both."""
    image = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK)
    c = tl.program_id(0) * width + k
    r = tl.arange(0, ROWS)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    times_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < width)[None, :]
        offsets = (image * num_parts + (row + r)[:, None]) * 2 * channels + c[None, :]
        plain += tl.load(sums_ptr + offsets, mask=inside, other=0)
        times_normed += tl.load(sums_ptr + offsets + channels, mask=inside, other=0)
    dbias, dweight = tl.sum(plain, axis=0), tl.sum(times_normed, axis=0)
    weight = tl.load(weight_ptr + c, mask=k < width, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + image * channels + c, mask=k < width, other=0)
    out = image * 2 * channels + c
    tl.store(totals_ptr + out, dbias, mask=k < width)
    tl.store(totals_ptr + out + channels, dweight, mask=k < width)
    level = rstd * (tl.sum(dbias * weight) / num_pixels / width)
    rise = rstd * (tl.sum(dweight * weight) / num_pixels / width)
    tl.store(slopes_ptr + out, level, mask=k < width)
    tl.store(slopes_ptr + out + channels, rise, mask=k < width)
