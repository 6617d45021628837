"""The reductions of the group norms in Triton: statistics forward, sums over groups backward.

Every array by channel is ``[B, C]`` float32, with the number of a group repeated for each of its
channels, so that it is read 16 bytes at a time. An image is summed in parts of whole tiles, ROWS
pixels by BLOCK channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import cdiv, launch, next_power_of_2, tile

ELEMENTS = 2048
"""Of a tile: 16 a thread with 4 warps of 32 threads."""


def pixel_tile(channels: int) -> dict[str, int | bool]:
    """Choose ROWS and BLOCK of pixels: at most 128 channels, 256 bytes of bfloat16."""
    block = min(next_power_of_2(channels), 128)
    return tile(num_warps=4, ROWS=ELEMENTS // block, BLOCK=block)


def group_tile(group_size: int) -> dict[str, int | bool]:
    """Choose ROWS, the parts that a program reads at once, of BLOCK channels: a whole group."""
    block = next_power_of_2(group_size)
    return tile(num_warps=4, ROWS=max(ELEMENTS // block, 1), BLOCK=block)


def part_length(num_rows: int, channels: int) -> int:
    """Return the rows of a part: 512 parts in all if each has 4 to 32 tiles."""
    options = pixel_tile(channels)
    num_tiles = cdiv(num_rows, options["ROWS"]) * cdiv(channels, options["BLOCK"])
    return options["ROWS"] * min(max(cdiv(num_tiles, 512), 4), 32)


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of ``x [B, S, C]``, which is not empty."""
    batch, num_pixels, channels = x.shape
    options = pixel_tile(channels)
    part = part_length(num_pixels, channels)
    num_parts = cdiv(num_pixels, part)
    moments = x.new_empty(batch, num_parts, 2, channels, dtype=torch.float32)
    grid = num_parts, cdiv(channels, options["BLOCK"]), batch
    launch(group_norm_moments_kernel, grid, x, moments, num_pixels, channels, part, **options)
    mean, rstd = x.new_empty(2, batch, channels, dtype=torch.float32)
    size = channels // groups
    launch(
        group_norm_stats_kernel, (groups, batch), moments, mean, rstd, num_pixels, channels, size,
        part, num_parts, eps, **group_tile(size),
    )  # fmt: skip
    return mean, rstd


def gradient_terms(
    sums: Tensor, rstd: Tensor, weight: Tensor, groups: int, num_pixels: int
) -> Tensor:
    """Return ``[2, B, 2, C]``: for each image, the totals of ``sums`` and the terms (c0, c1) of dx.

    ``sums [B, parts, 2, C]`` are those of d, the gradient of the norm, and of d * normed. Their
    totals are the gradients of bias and weight, and dx = d * scale - c0 - normed * c1.
    """
    batch, num_parts, _, channels = sums.shape
    out = sums.new_empty(2, batch, 2, channels)
    size = channels // groups
    launch(
        group_norm_bwd_group_kernel, (groups, batch), sums, rstd, weight, out[0], out[1],
        num_pixels, channels, size, num_parts, **group_tile(size),
    )  # fmt: skip
    return out


@triton.jit
def group_norm_moments_kernel(
    x_ptr, moments_ptr, num_pixels, channels, part, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Welford's mean and squared deviations of every element of a tile, then of the part (Chan)."""
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
        fraction = 1.0 / (row // ROWS + 1)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * fraction
        deviations += delta * delta * (1 - fraction)
    count = tl.maximum((num - r + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    # The mean of differences: a sum of large means would lose their common digits.
    pivot = tl.sum(tl.where(r[:, None] == 0, mean, 0.0), axis=0)
    centre = pivot + tl.sum((mean - pivot[None, :]) * count, axis=0) / num
    delta = tl.where(count > 0, mean - centre[None, :], 0.0)
    spread = tl.sum(deviations + count * delta * delta, axis=0)
    out = moments_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(out, centre, mask=c < channels)
    tl.store(out + channels, spread, mask=c < channels)


@triton.jit
def group_norm_stats_kernel(
    moments_ptr, mean_ptr, rstd_ptr, num_pixels, channels, group_size, part, num_parts, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group, from the moments of its channels in every part (Chan)."""
    image = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK)
    c = tl.program_id(0) * group_size + k
    r = tl.arange(0, ROWS)
    moments_ptr += image * num_parts * 2 * channels
    pivot = tl.load(moments_ptr + tl.program_id(0) * group_size)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < group_size)[None, :]
        offsets = (row + r)[:, None] * 2 * channels + c[None, :]
        weight = tl.minimum(num_pixels - (row + r) * part, part).to(tl.float32) / num_pixels
        delta = tl.load(moments_ptr + offsets, mask=inside, other=0) - pivot
        total += tl.where(inside, delta * weight[:, None], 0.0)
    mean = pivot + tl.sum(total) / group_size
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < group_size)[None, :]
        offsets = (row + r)[:, None] * 2 * channels + c[None, :]
        count = tl.minimum(num_pixels - (row + r) * part, part).to(tl.float32)
        delta = tl.load(moments_ptr + offsets, mask=inside, other=0) - mean
        spread = tl.load(moments_ptr + offsets + channels, mask=inside, other=0)
        total += tl.where(inside, spread + count[:, None] * delta * delta, 0.0)
    variance = tl.sum(total) / num_pixels / group_size
    rstd = tl.rsqrt(variance + eps)
    out = image * channels + c
    tl.store(mean_ptr + out, mean + tl.zeros([BLOCK], tl.float32), mask=k < group_size)
    tl.store(rstd_ptr + out, rstd + tl.zeros([BLOCK], tl.float32), mask=k < group_size)


@triton.jit
def group_norm_bwd_group_kernel(
    sums_ptr, rstd_ptr, weight_ptr, totals_ptr, terms_ptr, num_pixels, channels, group_size,
    num_parts, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Totals of a group's sums, and the terms of dx: rstd * mean(weight * total) of both."""
    image = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK)
    c = tl.program_id(0) * group_size + k
    r = tl.arange(0, ROWS)
    sum_d = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_d_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_parts, ROWS):
        inside = (row + r < num_parts)[:, None] & (k < group_size)[None, :]
        offsets = (image * num_parts + (row + r)[:, None]) * 2 * channels + c[None, :]
        sum_d += tl.load(sums_ptr + offsets, mask=inside, other=0)
        sum_d_normed += tl.load(sums_ptr + offsets + channels, mask=inside, other=0)
    dbias, dweight = tl.sum(sum_d, axis=0), tl.sum(sum_d_normed, axis=0)
    weight = tl.load(weight_ptr + c, mask=k < group_size, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + image * channels + c, mask=k < group_size, other=0)
    out = image * 2 * channels + c
    tl.store(totals_ptr + out, dbias, mask=k < group_size)
    tl.store(totals_ptr + out + channels, dweight, mask=k < group_size)
    c0 = rstd * (tl.sum(dbias * weight) / num_pixels / group_size)
    c1 = rstd * (tl.sum(dweight * weight) / num_pixels / group_size)
    tl.store(terms_ptr + out, c0, mask=k < group_size)
    tl.store(terms_ptr + out + channels, c1, mask=k < group_size)
