"""Tiles of the group norms in Triton, and the statistics of their forward pass.

A tile is ROWS pixels by BLOCK channels, which are GROUPS whole groups of WIDE channels each, padded
to a power of two. An image is summed in parts: a program stores the mean and the squared
deviations of each of its groups. Whoever needs the statistics merges the parts (Chan): they are few
enough for every program, and a merge is no launch.
"""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import (
    Gpu,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch_planned,
    next_power_of_2,
    plan_launch,
    planned,
    tile,
)

ELEMENTS = 4096
"""Of a tile: 32 a thread with 4 warps of 32 threads, 64 bytes of bfloat16 in flight."""
OF_MOMENTS = 2
"""Tiles that the statistics take for one: 128 bytes in flight, of their one tensor."""
ROWS_OF_THREAD = 8
"""Of such a tile, with 8 channels each: a thread adds them before it adds to its sums."""
MOST_PARTS = 256


class Layout(NamedTuple):
    """How the programs of a launch divide ``[B, S, C]`` or ``[B, T, H, W, C]``."""

    constants: dict[str, int | bool]
    """Options of a launch, without WIDTH and PARTS."""
    blocks: int
    """Of channels."""
    num_pixels: int
    """Of an image."""
    part: int
    """Pixels of a part, whole tiles of the statistics but for the last."""
    num_parts: int


def layout(shape: torch.Size, groups: int, gpu: Gpu) -> Layout:
    """Divide the pixels of an image into parts, so that four programs run on a multiprocessor."""
    batch, *sizes, channels = shape
    num_pixels = prod(sizes)
    size = channels // groups
    wide = next_power_of_2(size)
    of_block = min(max(128 // wide, 1), next_power_of_2(groups))
    block = of_block * wide
    rows = max(ELEMENTS // block, 1)
    blocks = cdiv(groups, of_block)
    wanted = 4 * gpu.num_sms // (blocks * batch)
    of_moments = OF_MOMENTS * rows
    tiles = cdiv(num_pixels, of_moments)
    part = of_moments * cdiv(tiles, min(max(wanted, 1), MOST_PARTS))
    constants = tile(
        num_warps=4, CHANNELS=channels, SIZE=size, WIDE=wide, GROUPS=of_block, ROWS=rows
    )
    return Layout(constants, blocks, num_pixels, part, cdiv(num_pixels, part))


@planned
def plan_moments(
    shape: torch.Size, groups: int, gpu: Gpu
) -> tuple[tuple[int, int, int, int], LaunchPlan]:
    parted = layout(shape, groups, gpu)
    grid = parted.num_parts, parted.blocks, shape[0]
    rows = OF_MOMENTS * parted.constants["ROWS"]
    constants = parted.constants | {"ROWS": rows, "FOLD": min(rows, ROWS_OF_THREAD)}
    plan = plan_launch(grid, parted.num_pixels, parted.part, **constants)
    return (shape[0], 2, parted.num_parts, groups), plan


def moments(x: Tensor, groups: int) -> Tensor:
    """Return ``[B, 2, parts, G]``: means and squared deviations of the groups of each part."""
    shape, plan = plan_moments(x.shape, groups, gpu_of(x))
    out = x.new_empty(*shape, dtype=torch.float32)
    launch_planned(group_norm_moments_kernel, plan, x, out)
    return out


@triton.jit
def channels_of(
    block, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr
):
    """Return the channels of a block and which of them exist."""
    j = tl.arange(0, GROUPS * WIDE)
    if SIZE == WIDE:
        c = block * (GROUPS * WIDE) + j
        exists = c < CHANNELS
    else:
        c = (block * GROUPS + j // WIDE) * SIZE + j % WIDE
        exists = (j % WIDE < SIZE) & (c < CHANNELS)
    return c, exists


@triton.jit
def groups_of(block, CHANNELS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Return the groups of a block and which of them exist."""
    g = block * GROUPS + tl.arange(0, GROUPS)
    return g, g < CHANNELS // SIZE


@triton.jit
def load_channels(ptr, c, exists):
    return tl.load(ptr + c, mask=exists, other=0).to(tl.float32)


@triton.jit
def by_channel(of_group, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    """Repeat the number of a group for each of its channels."""
    return tl.reshape(tl.broadcast_to(of_group[:, None], [GROUPS, WIDE]), [GROUPS * WIDE])


@triton.jit
def store_terms(
    terms_ptr, first, second, block, part, num_parts, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the sums over each group of two numbers by channel."""
    g, exists = groups_of(block, CHANNELS, SIZE, GROUPS)
    num_groups: tl.constexpr = CHANNELS // SIZE
    terms_ptr += part * num_groups + g
    tl.store(terms_ptr, tl.sum(tl.reshape(first, [GROUPS, WIDE]), axis=1), mask=exists)
    terms_ptr += num_parts * num_groups
    tl.store(terms_ptr, tl.sum(tl.reshape(second, [GROUPS, WIDE]), axis=1), mask=exists)


@triton.jit
def merge(
    moments_ptr, block, num_pixels, part, num_parts, eps, CHANNELS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return mean and rstd ``[GROUPS]`` from the moments of all parts of an image (Chan)."""
    p = tl.arange(0, PARTS)
    g, exists = groups_of(block, CHANNELS, SIZE, GROUPS)
    inside = (p < num_parts)[:, None] & exists[None, :]
    at = p[:, None] * (CHANNELS // SIZE) + g[None, :]
    means = tl.load(moments_ptr + at, mask=inside, other=0)
    spreads = tl.load(moments_ptr + num_parts * (CHANNELS // SIZE) + at, mask=inside, other=0)
    count = tl.minimum(num_pixels - p * part, part).to(tl.float32)[:, None]
    # The mean of differences: a sum of large means would lose their common digits.
    pivot = tl.sum(tl.where(p[:, None] == 0, means, 0.0), axis=0)
    delta = tl.where(inside, means - pivot[None, :], 0.0)
    mean = pivot + tl.sum(delta * count, axis=0) / num_pixels
    delta = tl.where(inside, means - mean[None, :], 0.0)
    variance = tl.sum(spreads + count * SIZE * delta * delta, axis=0) / num_pixels / SIZE
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def folded(x, FOLD: tl.constexpr, ROWS: tl.constexpr):
    """Add every ``ROWS // FOLD``-th row: ``[ROWS // FOLD, C]``."""
    return tl.sum(tl.reshape(x, [FOLD, ROWS // FOLD, x.shape[1]]), axis=0)


@triton.jit
def group_norm_moments_kernel(
    x_ptr, moments_ptr, num_pixels, part, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each group over a part, from sums of x - pivot.

    The pivot of a channel is its mean over the first tile. The squares of n tiles of which one is
    the first are at least 1 / n of those of the pivot: no more digits are lost than n has.
    """
    image = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    c, exists = channels_of(block, CHANNELS, SIZE, WIDE, GROUPS)
    first = tl.program_id(0) * part
    num = tl.minimum(num_pixels - first, part)
    r = tl.arange(0, ROWS)
    at = r[:, None] * CHANNELS + c[None, :]
    x_ptr += (image * num_pixels + first) * CHANNELS
    tile = tl.load(x_ptr + at, mask=(r < num)[:, None] & exists[None, :], other=0)
    pivot = tl.sum(tile.to(tl.float32), axis=0)[None, :] / tl.minimum(num, ROWS)
    sums = tl.zeros([ROWS // FOLD, GROUPS * WIDE], tl.float32)
    squares = tl.zeros([ROWS // FOLD, GROUPS * WIDE], tl.float32)
    whole = num // ROWS * ROWS
    for row in range(ROWS, whole + ROWS, ROWS):
        # The last tile, which is ragged, is loaded by the last iteration and added below.
        x_ptr += ROWS * CHANNELS
        inside = (row + r < num)[:, None] & exists[None, :]
        ahead = tl.load(x_ptr + at, mask=inside, other=0)
        delta = tile.to(tl.float32) - pivot
        sums += folded(delta, FOLD, ROWS)
        squares += folded(delta * delta, FOLD, ROWS)
        tile = ahead
    if whole < num:
        delta = tl.where((whole + r < num)[:, None], tile.to(tl.float32) - pivot, 0.0)
        sums += folded(delta, FOLD, ROWS)
        squares += folded(delta * delta, FOLD, ROWS)
    sum_c = tl.sum(sums, axis=0)
    mean_c = tl.sum(tl.where(r[:, None] == 0, pivot, 0.0), axis=0) + sum_c / num
    spread_c = tl.maximum(tl.sum(squares, axis=0) - sum_c * (sum_c / num), 0.0)
    k = tl.arange(0, WIDE)[None, :]
    means, spreads = (
        tl.reshape(mean_c, [GROUPS, WIDE]), tl.reshape(spread_c, [GROUPS, WIDE])
    )  # fmt: skip
    pivots = tl.sum(tl.where(k == 0, means, 0.0), axis=1)[:, None]
    mean = pivots + tl.sum(tl.where(k < SIZE, means - pivots, 0.0), axis=1)[:, None] / SIZE
    delta = means - mean
    spread = tl.sum(tl.where(k < SIZE, spreads + num * delta * delta, 0.0), axis=1)
    g, is_group = groups_of(block, CHANNELS, SIZE, GROUPS)
    num_groups: tl.constexpr = CHANNELS // SIZE
    out = (image * 2 * tl.num_programs(0) + tl.program_id(0)) * num_groups + g
    tl.store(moments_ptr + out, tl.sum(mean, axis=1), mask=is_group)
    tl.store(moments_ptr + out + tl.num_programs(0) * num_groups, spread, mask=is_group)
