"""What the kernels of a causal convolution in Triton share: its product, and what goes into it.

The product is an implicit GEMM: a row is a pixel of the result, a column one of its channels, and
a term is a tap of the kernel at a channel. Operands are channels last, ``[B, pixels, channels]``,
normed and activated in a pass of their own: in the product, SiLU would be taken once for every tap.
They are rounded to the dtype of x, as the tensor cores take them, and summed up in float32. No
padding is stored: a tap that falls outside of the video reads zeros.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime import launch
from emu3_kernels.runtime.launch import next_power_of_2, why_not_triton

WHOLE = 64
"""Channels of an operand come in multiples of this, or are a power of two below it."""

MOST_PIXELS = 2**30
"""Of one video: the place of a pixel, and of one past the last block, is an int32."""


class Tile(NamedTuple):
    """What a program holds at once of a product, its warps, and the blocks under way."""

    pixels: int
    terms: int
    results: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        return {
            "PIXELS": self.pixels,
            "TERMS": self.terms,
            "RESULTS": self.results,
            "STAGES": self.num_stages,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def why_not(x: Tensor, *rest: object) -> str | None:
    """Say why the kernels cannot take these operands; None if they can."""
    tensors = [tensor for tensor in (x, *rest) if isinstance(tensor, Tensor)]
    reason = next(filter(None, map(why_not_triton, tensors)), None)
    if reason is None and x.shape[2:].numel() >= MOST_PIXELS:
        got = x.shape[2:].numel()
        return f"the kernels take less than {MOST_PIXELS} pixels of a video, got {got}"
    return reason


def product_tile(dtype: torch.dtype, num_results: int) -> Tile:
    """Choose by the channels alone: a piece of a video is to get the tile of the whole.

    A third block under way is more than the shared memory of gfx942.
    """
    results = min(max(next_power_of_2(num_results), 16), 128)
    if dtype == torch.float32:
        return Tile(64, 32, min(results, 64), num_warps=4, num_stages=2)
    num_warps = 8 if results == 128 else 4
    return Tile(128, 64, results, num_warps, num_stages=2 if launch.WARP == 64 else 3)


def padded(channels: int) -> int:
    """Count the channels of an operand: a block of terms is whole, an access has 8 bytes."""
    if channels > WHOLE:
        return triton.cdiv(channels, WHOLE) * WHOLE
    return max(next_power_of_2(channels), 4)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Round operands to the dtype of x, unless that of the weight is wider."""
    return torch.promote_types(x.dtype, weight.dtype)


def panel(weight: Tensor, dtype: torch.dtype, results: int) -> Tensor:
    """Lay ``[N, C, kt, kh, kw]`` out as the product reads it: ``[taps, channels, columns]``."""
    num_results, channels = weight.shape[:2]
    columns = triton.cdiv(num_results, results) * results
    out = weight.new_zeros(weight[0, 0].numel(), padded(channels), columns, dtype=dtype)
    out[:, :channels, :num_results] = weight.flatten(2).permute(2, 1, 0)
    return out


def taps(weight: Tensor, stride: tuple[int, int, int]) -> dict[str, int]:
    """Return the constants of a kernel that the walk over the taps depends on."""
    names = ("KT", "KH", "KW", "ST", "SH", "SW")
    return dict(zip(names, (*weight.shape[2:], *stride), strict=True))


def operand(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool, dtype: torch.dtype
) -> Tensor:
    """Norm and activate ``[B, C, T, H, W]``, and round it to ``dtype`` channels last."""
    batch, channels, num_pixels = *x.shape[:2], x[0, 0].numel()
    width = padded(channels)
    out = x.new_empty(batch, num_pixels, width, dtype=dtype)
    block = min(width, WHOLE)
    pixels = 4096 // block
    grid = (triton.cdiv(num_pixels, pixels) * batch, width // block)
    _operand_kernel[grid](
        x, scale, shift, out, num_pixels, channels, SILU=silu, WIDTH=width, PIXELS=pixels,
        CHANNELS=block, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def column_sums(rows: Tensor) -> Tensor:
    """Sum ``[R, N]`` over R in float32, in an order that R alone fixes."""
    chunk, (num_rows, width) = 512, rows.shape
    if num_rows == 1 and rows.dtype == torch.float32:
        return rows[0]
    block = min(next_power_of_2(width), 128)
    sums = rows.new_empty(triton.cdiv(num_rows, chunk), width, dtype=torch.float32)
    _sum_kernel[(len(sums) * triton.cdiv(width, block),)](
        rows, sums, num_rows, WIDTH=width, CHUNK=chunk, ROWS=launch.WARP, BLOCK=block,
        num_warps=max(block // 32, 1), num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return column_sums(sums)


@triton.jit
def silu_slope(z):
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def load_row(ptr, c, inside):
    """Load a vector as the row that a tile is added to or multiplied by."""
    return tl.load(ptr + c, mask=inside, other=0).to(tl.float32)[None, :]


@triton.jit
def place(p, height, width):
    """Return the frame, the row and the column of a pixel."""
    return p // (height * width), p // width % height, p % width


@triton.jit
def tile_of(num_pixels, columns, PIXELS: tl.constexpr, RESULTS: tl.constexpr):
    """Return batch, block, pixels and channels of a program; those that share pixels are close."""
    program = tl.program_id(0)
    num_columns, num_blocks = columns // RESULTS, tl.cdiv(num_pixels, PIXELS)
    n = program % num_columns * RESULTS + tl.arange(0, RESULTS)
    program //= num_columns
    block = program % num_blocks
    batch = (program // num_blocks).to(tl.int64)
    return batch, block, block * PIXELS + tl.arange(0, PIXELS), n


@triton.jit
def load_taps(
    ptr, t, h, w, jt, jh, jw, c, used, frames, height, width,
    CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Load channel c at STEP * j from t, h, w: ``[pixels, terms]``, zeros outside of the video."""
    it = t[:, None] + STEP * jt[None, :]
    ih = h[:, None] + STEP * jh[None, :]
    iw = w[:, None] + STEP * jw[None, :]
    inside = (it >= 0) & (it < frames) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
    pixel = (t.to(tl.int64) * height + h) * width + w
    away = (jt.to(tl.int64) * height + jh) * width + jw
    offsets = pixel[:, None] * CHANNELS + (STEP * away * CHANNELS + c)[None, :]
    return tl.load(ptr + offsets, mask=inside & used[None, :], other=0)


@triton.jit
def product(
    operand_ptr, panel_ptr, t, h, w, tap_t, tap_h, tap_w, n, columns, frames, height, width,
    STEP: tl.constexpr, EVERY_T: tl.constexpr, EVERY_H: tl.constexpr, EVERY_W: tl.constexpr,
    CHANNELS: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PIXELS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum operand @ panel over the taps tap + every * j, which see the pixel at STEP * j.

    The order of the terms does not depend on the pixel, and an absent frame adds exact zeros.
    """
    num_t, num_h, num_w = tl.cdiv(KT, EVERY_T), tl.cdiv(KH, EVERY_H), tl.cdiv(KW, EVERY_W)
    acc = tl.zeros([PIXELS, RESULTS], tl.float32)
    for first in tl.range(0, num_t * num_h * num_w * CHANNELS, TERMS, num_stages=STAGES):
        k = first + tl.arange(0, TERMS)
        j, c = k // CHANNELS, k % CHANNELS
        jt, jh, jw = j // (num_h * num_w), j // num_w % num_h, j % num_w
        kt, kh, kw = tap_t + EVERY_T * jt, tap_h + EVERY_H * jh, tap_w + EVERY_W * jw
        used = (kt < KT) & (kh < KH) & (kw < KW)
        terms = load_taps(
            operand_ptr, t, h, w, jt, jh, jw, c, used, frames, height, width, CHANNELS, STEP
        )
        rows = (((kt * KH + kh) * KW + kw) * CHANNELS + c).to(tl.int64)
        weights = tl.load(
            panel_ptr + rows[:, None] * columns + n[None, :], mask=used[:, None], other=0
        )
        acc = tl.dot(terms, weights, acc, input_precision="ieee")
    return acc


@triton.jit
def _operand_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, num_pixels, num_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[p, c] = act(scale * x[c, p] + shift), and zeros beyond the channels of x."""
    num_blocks = tl.cdiv(num_pixels, PIXELS)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    p = tl.program_id(0) % num_blocks * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < num_channels
    inside = (p < num_pixels)[:, None] & exists[None, :]
    offsets = c.to(tl.int64)[None, :] * num_pixels + p[:, None]
    x = tl.load(x_ptr + batch * num_channels * num_pixels + offsets, mask=inside, other=0)
    x = x.to(tl.float32)
    if scale_ptr is not None:
        x = x * load_row(scale_ptr, c, exists) + load_row(shift_ptr, c, exists)
    if SILU:
        x *= tl.sigmoid(x)
    out_ptr += (batch * num_pixels + p)[:, None] * WIDTH + c[None, :]
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=(p < num_pixels)[:, None])


@triton.jit
def _sum_kernel(
    rows_ptr, sums_ptr, num_rows, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of the rows."""
    num_blocks = tl.cdiv(WIDTH, BLOCK)
    c = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    chunk = (tl.program_id(0) // num_blocks).to(tl.int64)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (c < WIDTH)[None, :]
        offsets = row[:, None].to(tl.int64) * WIDTH + c[None, :]
        sums += tl.load(rows_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(sums_ptr + chunk * WIDTH + c, tl.sum(sums, axis=0), mask=c < WIDTH)
