"""A causal convolution in Triton, backward; norm and activations are computed again.

dx is a product over the taps that a pixel was seen by; where the stride is not 1, the pixels that
share their taps, a phase, go together. dweight is a product over pixels, cut into ranges that are
added up in order.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import EVERY, Plan, Wanted
from emu3_kernels.ops.conv3d.triton_blocks import (
    Tile,
    column_sums,
    load_row,
    load_taps,
    operand,
    padded,
    panel,
    place,
    product,
    product_dtype,
    product_tile,
    silu_slope,
    taps,
    tile_of,
)
from emu3_kernels.runtime.launch import NUM_MULTIPROCESSORS


def input_tile(dtype: torch.dtype, channels: int, stride: tuple[int, int, int]) -> Tile:
    """x, its norm and the slope of SiLU share the registers with the sum, and so do addresses
    where the columns of a phase lie apart.
    """
    tile = product_tile(dtype, channels)
    return tile._replace(results=min(tile.results, 64 if stride[2] == 1 else 32))


def weight_tile(dtype: torch.dtype, num_results: int) -> Tile:
    """The pixels are what is summed over: few, of float32 16 as 32 spill, and many terms."""
    tile = product_tile(dtype, num_results)
    return tile._replace(pixels=16 if dtype == torch.float32 else tile.terms, terms=tile.pixels)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
    wanted: Wanted = EVERY,
) -> tuple[Tensor | None, ...]:
    if not dy.numel():
        given = (x, weight, bias, scale, shift)
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in given)
    dtype = product_dtype(x, weight)
    terms = operand(x, scale, shift, plan.silu, dtype)
    if plan.post_silu:
        dz = _unactivated(dy, terms, x, weight, bias, plan)
    else:
        dz = operand(dy, None, None, False, dtype)
    dx = dweight = dbias = dscale = dshift = None
    if wanted.input:
        dx, dscale, dshift = _of_input(dz, x, weight, scale, shift, dy.shape, plan)
    if wanted.weight:
        dweight = _of_weight(dz, terms, x, weight, dy.shape, plan)
        dbias = None if bias is None else column_sums(dz.flatten(0, 1))[: len(bias)].to(bias.dtype)
    return dx, dweight, dbias, dscale, dshift


def _unactivated(
    dy: Tensor, terms: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """Return dz ``[B, pixels, channels]``: dy ahead of the SiLU after the convolution."""
    num_pixels, width = dy[0, 0].numel(), padded(dy.shape[1])
    dz = terms.new_empty(len(dy), num_pixels, width)
    tile = product_tile(terms.dtype, weight.shape[0])
    weights = panel(weight, terms.dtype, tile.results)
    columns = weights.shape[2]
    grid = (triton.cdiv(num_pixels, tile.pixels) * (columns // tile.results) * len(dy),)
    _bwd_z_kernel[grid](
        dy, terms, weights, bias, dz, plan.front, *x.shape[2:], *dy.shape[1:], columns,
        WIDTH=width, CHANNELS=weights.shape[1], **taps(weight, plan.stride), **tile.options(),
    )  # fmt: skip
    return dz


def _of_input(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y_shape: torch.Size,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx = torch.empty_like(x)
    batch, channels, *sizes = x.shape
    tile = input_tile(dz.dtype, channels, plan.stride)
    weights = panel(weight.transpose(0, 1), dz.dtype, tile.results)
    columns = weights.shape[2]
    blocks = triton.cdiv(
        prod(triton.cdiv(n, s) for n, s in zip(sizes, plan.stride, strict=True)), tile.pixels
    )
    phases = prod(plan.stride)
    sums = None
    if scale is not None:
        sums = dz.new_empty(batch * phases * blocks, 2, columns, dtype=torch.float32)
    _bwd_x_kernel[blocks * (columns // tile.results) * batch, phases](
        dz, weights, x, scale, shift, dx, sums, plan.front, channels, *sizes, *y_shape[2:], columns,
        SILU=plan.silu, CHANNELS=weights.shape[1], **taps(weight, plan.stride), **tile.options(),
    )  # fmt: skip
    if scale is None:
        return dx, None, None
    dscale, dshift = column_sums(sums.flatten(1)).view(2, columns)[:, :channels]
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


def _of_weight(
    dz: Tensor, terms: Tensor, x: Tensor, weight: Tensor, y_shape: torch.Size, plan: Plan
) -> Tensor:
    num_results, channels = weight.shape[:2]
    tile = weight_tile(terms.dtype, num_results)
    num_taps, width = weight[0, 0].numel(), terms.shape[2]
    columns = triton.cdiv(num_results, tile.results) * tile.results
    tiles = triton.cdiv(num_taps * width, tile.terms) * (columns // tile.results)
    steps = len(dz) * triton.cdiv(dz.shape[1], tile.pixels)
    # Two programs a multiprocessor, and no range is empty.
    length = triton.cdiv(steps, min(triton.cdiv(2 * NUM_MULTIPROCESSORS, tiles), steps))
    ranges = triton.cdiv(steps, length)
    parts = terms.new_empty(ranges, num_taps * width, columns, dtype=torch.float32)
    _bwd_weight_kernel[tiles, ranges](
        terms, dz, parts, plan.front, *x.shape[2:], *y_shape[2:], columns, steps, length,
        WIDTH=dz.shape[2], CHANNELS=width, **taps(weight, plan.stride), **tile.options(),
    )  # fmt: skip
    dweight = column_sums(parts.flatten(1)).view(num_taps, width, columns)
    dweight = dweight[:, :channels, :num_results].permute(2, 1, 0).to(weight.dtype)
    return dweight.reshape(weight.shape)


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def _bwd_z_kernel(
    dy_ptr, operand_ptr, panel_ptr, bias_ptr, dz_ptr, front, frames, height, width,
    num_results, y_frames, y_height, y_width, columns,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PIXELS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dz = dy * silu'(operand @ panel + bias)."""
    num_pixels = y_frames * (y_height * y_width)
    batch, _, p, n = tile_of(num_pixels, columns, PIXELS, RESULTS)
    t, h, w = place(p, y_height, y_width)
    operand_ptr += batch * frames * height * width * CHANNELS
    z = product(
        operand_ptr, panel_ptr, t * ST - front, h * SH - (KH - SH + 1) // 2,
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, KT, KH, KW, PIXELS, TERMS, RESULTS, STAGES,
    )  # fmt: skip
    inside, exists = (p < num_pixels)[:, None], n < num_results
    if bias_ptr is not None:
        z += load_row(bias_ptr, n, exists)
    offsets = (batch * num_results + n)[None, :] * num_pixels + p[:, None]
    dy = tl.load(dy_ptr + offsets, mask=inside & exists[None, :], other=0).to(tl.float32)
    dz_ptr += (batch * num_pixels + p)[:, None] * WIDTH + n[None, :]
    dz = (dy * silu_slope(z)).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr, dz, mask=inside & (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def _bwd_x_kernel(
    dz_ptr, panel_ptr, x_ptr, scale_ptr, shift_ptr, dx_ptr, sums_ptr, front, num_channels,
    frames, height, width, y_frames, y_height, y_width, columns,
    SILU: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PIXELS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = scale * du;  du = (dz @ panel) * act'(scale * x + shift);  sums of du * x and du."""
    rows_h, rows_w = tl.cdiv(height, SH), tl.cdiv(width, SW)
    num_pixels = tl.cdiv(frames, ST) * rows_h * rows_w
    batch, block, p, n = tile_of(num_pixels, columns, PIXELS, RESULTS)
    t, h, w = place(p, rows_h, rows_w)
    phase = tl.program_id(1)
    # A pixel of the video lies at stride * q + tap of its padded axis, for q of a result.
    at_t = phase // (SH * SW) + front
    at_h = phase // SW % SH + (KH - SH + 1) // 2
    at_w = phase % SW + (KW - SW + 1) // 2
    du = product(
        dz_ptr + batch * y_frames * y_height * y_width * CHANNELS, panel_ptr,
        t + at_t // ST, h + at_h // SH, w + at_w // SW, at_t % ST, at_h % SH, at_w % SW,
        n, columns, y_frames, y_height, y_width,
        -1, ST, SH, SW, CHANNELS, KT, KH, KW, PIXELS, TERMS, RESULTS, STAGES,
    )  # fmt: skip
    exists = n < num_channels
    inside = p < num_pixels
    if ST * SH * SW > 1:
        t, h, w = (
            t * ST + phase // (SH * SW), h * SH + phase // SW % SH, w * SW + phase % SW
        )  # fmt: skip
        inside &= (t < frames) & (h < height) & (w < width)
        p = (t * height + h) * width + w
    inside = inside[:, None] & exists[None, :]
    offsets = (batch * num_channels + n)[None, :] * (frames * height * width) + p[:, None]
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    du = tl.where(inside, du, 0)
    u = x
    if scale_ptr is not None:
        scale = load_row(scale_ptr, n, exists)
        u = x * scale + load_row(shift_ptr, n, exists)
    if SILU:
        du *= silu_slope(u)
    if scale_ptr is not None:
        sums_ptr += ((batch * ST * SH * SW + phase) * tl.cdiv(num_pixels, PIXELS) + block) * (
            2 * columns
        )
        tl.store(sums_ptr + n, tl.sum(du * x, axis=0))
        tl.store(sums_ptr + columns + n, tl.sum(du, axis=0))
        du *= scale
    tl.store(dx_ptr + offsets, du.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def _bwd_weight_kernel(
    operand_ptr, dz_ptr, parts_ptr, front, frames, height, width, y_frames, y_height, y_width,
    columns, num_steps, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PIXELS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part = operand.T @ dz over a range of blocks of pixels, for a block of terms."""
    num_columns = columns // RESULTS
    k = tl.program_id(0) // num_columns * TERMS + tl.arange(0, TERMS)
    n = tl.program_id(0) % num_columns * RESULTS + tl.arange(0, RESULTS)
    j, c = k // CHANNELS, k % CHANNELS
    kt, kh, kw = j // (KH * KW), j // KW % KH, j % KW
    num_pixels = y_frames * (y_height * y_width)
    num_blocks = tl.cdiv(num_pixels, PIXELS)
    part = tl.program_id(1)
    acc = tl.zeros([TERMS, RESULTS], tl.float32)
    last = tl.minimum((part + 1) * length, num_steps)
    for step in tl.range(part * length, last, num_stages=STAGES):
        batch = (step // num_blocks).to(tl.int64)
        p = step % num_blocks * PIXELS + tl.arange(0, PIXELS)
        t, h, w = place(p, y_height, y_width)
        terms = load_taps(
            operand_ptr + batch * frames * height * width * CHANNELS,
            t * ST - front, h * SH - (KH - SH + 1) // 2, w * SW - (KW - SW + 1) // 2,
            kt, kh, kw, c, kt < KT, frames, height, width, CHANNELS, 1,
        )  # fmt: skip
        inside = (p < num_pixels)[:, None] & (n < WIDTH)[None, :]
        offsets = (batch * num_pixels + p)[:, None] * WIDTH + n[None, :]
        dz = tl.load(dz_ptr + offsets, mask=inside, other=0)
        acc = tl.dot(terms.T, dz, acc, input_precision="ieee")
    parts_ptr += (part.to(tl.int64) * KT * KH * KW * CHANNELS + k)[:, None] * columns + n[None, :]
    tl.store(parts_ptr, acc, mask=(kt < KT)[:, None])
