"""The GEMM of a causal convolution in Triton, and its operands.

It is an implicit GEMM: M are the pixels of the output, N its channels, and K the taps of the kernel
times the input channels. The A operand is channels-last, ``[B, pixels, channels]``, and is normed
and activated in a pass of its own: in the GEMM, SiLU would be computed once for every tap. Operands
are rounded to the dtype of x for the tensor cores and summed in float32. No padding is stored: a
tap outside of the video reads zeros. The few weights of narrow convolutions are read as they are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import volume
from emu3_kernels.runtime.launch import (
    INTERPRETED,
    Gpu,
    LaunchPlan,
    cdiv,
    launch_planned,
    next_power_of_2,
    plan_launch,
    planned,
    tile,
)
from emu3_kernels.runtime.triton_silu import silu

WHOLE = 64
"""Packed channels are a multiple of this, or a power of two below it."""

MOST_IN_PLACE = 16
"""Channels up to which a kernel reads the weights in place, cached: packing takes two launches."""


def gemm_tile(gpu: Gpu, dtype: torch.dtype, m: int, n: int) -> dict[str, int | bool]:
    """Choose by N alone: a piece of a video must have the tile, and so the sums, of the whole.

    M matters to the interpreter. A third stage is more than the shared memory of gfx942.
    """
    block_n = min(max(next_power_of_2(n), 16), 128)
    if dtype == torch.float32:
        blocks = {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_N": min(block_n, 64)}
        num_warps, num_stages = 4, 2
    else:
        blocks = {"BLOCK_M": 128, "BLOCK_K": 64, "BLOCK_N": block_n}
        num_warps, num_stages = 8 if block_n == 128 else 4, 2 if gpu.warp_size == 64 else 3
    if INTERPRETED:
        # Little but the number of operations takes time. BLOCK_K, the order of sums, is a GPU's.
        blocks["BLOCK_M"] = max(blocks["BLOCK_M"], min(next_power_of_2(m), 512))
    return tile(num_warps, num_stages, **blocks, STAGES=num_stages)


def gemm_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Round operands to the dtype of x, unless that of the weight is wider."""
    return torch.promote_types(x.dtype, weight.dtype)


def padded_channels(channels: int) -> int:
    """Count the packed channels: a block of K is whole, and an access has at least 8 bytes."""
    return cdiv(channels, WHOLE) * WHOLE if channels > WHOLE else max(next_power_of_2(channels), 4)


class WeightLayout(NamedTuple):
    """How the B operand ``[taps, channels, N]`` is read: in place, or packed."""

    packed: tuple[int, int, int] | None
    """Its shape, padded to whole blocks; None in place."""
    columns: int
    """N, padded to whole blocks."""
    constants: dict[str, int]
    """CHANNELS, padded, and the layout of weights in place: channels (0: packed), strides."""


def weight_layout(shape: torch.Size, block_n: int, *, transposed: bool = False) -> WeightLayout:
    """Lay out weights ``[O, C, kt, kh, kw]``: N is O, or C if ``transposed``."""
    out, channels, *_ = shape
    num_taps = volume(shape)
    n, k, n_stride, k_stride = out, channels, channels * num_taps, num_taps
    if transposed:
        n, k, n_stride, k_stride = k, n, k_stride, n_stride
    width, columns = padded_channels(k), cdiv(n, block_n) * block_n
    if out <= MOST_IN_PLACE and channels <= MOST_IN_PLACE:
        packed, strides = None, {"IN_PLACE": k, "N_STRIDE": n_stride, "C_STRIDE": k_stride}
    else:
        packed, strides = (num_taps, width, columns), {"IN_PLACE": 0, "N_STRIDE": 1, "C_STRIDE": 1}
    return WeightLayout(packed, columns, {"CHANNELS": width, **strides})


def weight_operand(
    weight: Tensor, dtype: torch.dtype, layout: WeightLayout, *, transposed: bool = False
) -> Tensor:
    """Return ``weight``, or a copy in ``dtype`` that is padded with zeros."""
    if layout.packed is None:
        return weight
    packed = weight.new_zeros(*layout.packed, dtype=dtype)
    by_tap = weight.flatten(2).permute(2, 0, 1)
    if not transposed:
        by_tap = by_tap.mT
    packed[:, : by_tap.shape[1], : by_tap.shape[2]] = by_tap
    return packed


def taps(weight: torch.Size, stride: tuple[int, int, int]) -> dict[str, int]:
    """Return the constants of a kernel that its addresses of taps depend on."""
    (_, _, kt, kh, kw), (st, sh, sw) = weight, stride
    return {"KT": kt, "KH": kh, "KW": kw, "ST": st, "SH": sh, "SW": sw}


def pack_video(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool, dtype: torch.dtype
) -> Tensor:
    """Norm and activate ``[B, C, T, H, W]``, and round it to ``dtype``, channels-last."""
    shape, of_pack = plan_pack(x.shape, silu)
    out = x.new_empty(*shape, dtype=dtype)
    launch_planned(causal_conv3d_pack_kernel, of_pack, x, scale, shift, out)
    return out


def pack_block(
    x: Tensor, scale1: Tensor, shift1: Tensor, hidden: Tensor, scale2: Tensor, shift2: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pack the input of each convolution of a residual block, in its dtype, in one launch."""
    shape, of_pack = plan_pack(x.shape, True, 2)
    a = x.new_empty(*shape)
    a2 = torch.empty_like(a)
    launch_planned(
        causal_conv3d_pack_block_kernel, of_pack, x, scale1, shift1, a, hidden, scale2, shift2, a2
    )
    return a, a2


@planned
def plan_pack(
    shape: torch.Size, silu: bool, num_videos: int = 1
) -> tuple[tuple[int, int, int], LaunchPlan]:
    batch, channels, *_ = shape
    num_pixels, width = volume(shape), padded_channels(channels)
    block = min(width, WHOLE)
    pixels = 4096 // block
    grid = cdiv(num_pixels, pixels) * batch, width // block, num_videos
    options = tile(num_warps=4, PIXELS=pixels, CHANNELS=block)
    of_pack = plan_launch(grid, num_pixels, channels, SILU=silu, WIDTH=width, **options)
    return (batch, num_pixels, width), of_pack


@triton.jit
def load_row(ptr, c, inside):
    """Load a vector as the row that a tile is added to or multiplied by."""
    return tl.load(ptr + c, mask=inside, other=0).to(tl.float32)[None, :]


@triton.jit
def coordinates(p, height, width):
    """Return the frame, the row and the column of a pixel."""
    return p // (height * width), p // width % height, p % width


@triton.jit
def program_tile(num_pixels, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return batch, block, pixels p and channels n; programs that share pixels are neighbours."""
    program = tl.program_id(0)
    num_n, num_blocks = columns // BLOCK_N, tl.cdiv(num_pixels, BLOCK_M)
    n = program % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= num_n
    block = program % num_blocks
    batch = (program // num_blocks).to(tl.int64)
    return batch, block, block * BLOCK_M + tl.arange(0, BLOCK_M), n


@triton.jit
def load_taps(
    ptr, t, h, w, jt, jh, jw, c, used, frames, height, width,
    CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Load channel c at STEP * j from t, h, w: ``[M, K]``, zeros outside of the video."""
    it = t[:, None] + STEP * jt[None, :]
    ih = h[:, None] + STEP * jh[None, :]
    iw = w[:, None] + STEP * jw[None, :]
    inside = (it >= 0) & (it < frames) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
    pixel = (t.to(tl.int64) * height + h) * width + w
    away = (jt.to(tl.int64) * height + jh) * width + jw
    offsets = pixel[:, None] * CHANNELS + (STEP * away * CHANNELS + c)[None, :]
    return tl.load(ptr + offsets, mask=inside & used[None, :], other=0)


@triton.jit
def implicit_gemm(
    a_ptr, weight_ptr, t, h, w, tap_t, tap_h, tap_w, n, num_n, columns, frames, height, width,
    STEP: tl.constexpr, EVERY_T: tl.constexpr, EVERY_H: tl.constexpr, EVERY_W: tl.constexpr,
    CHANNELS: tl.constexpr, IN_PLACE: tl.constexpr, N_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return A @ weight over the taps tap + every * j; that of j reads A at STEP * j from t, h, w.

    The order of K does not depend on the pixel, and a frame of zeros adds exact zeros.
    """
    num_t, num_h, num_w = tl.cdiv(KT, EVERY_T), tl.cdiv(KH, EVERY_H), tl.cdiv(KW, EVERY_W)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, num_t * num_h * num_w * CHANNELS, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        j, c = k // CHANNELS, k % CHANNELS
        jt, jh, jw = j // (num_h * num_w), j // num_w % num_h, j % num_w
        kt, kh, kw = tap_t + EVERY_T * jt, tap_h + EVERY_H * jh, tap_w + EVERY_W * jw
        used = (kt < KT) & (kh < KH) & (kw < KW)
        a = load_taps(a_ptr, t, h, w, jt, jh, jw, c, used, frames, height, width, CHANNELS, STEP)
        tap = (kt * KH + kh) * KW + kw
        if IN_PLACE:
            exists = (used & (c < IN_PLACE))[:, None] & (n < num_n)[None, :]
            at = (c * C_STRIDE + tap)[:, None] + n[None, :] * N_STRIDE
            weights = tl.load(weight_ptr + at, mask=exists, other=0).to(a.dtype)
        else:
            at = (tap * CHANNELS + c).to(tl.int64)[:, None] * columns + n[None, :]
            weights = tl.load(weight_ptr + at, mask=used[:, None], other=0)
        acc = tl.dot(a, weights, acc, input_precision="ieee")
    return acc


@triton.jit
def causal_conv3d_pack_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, num_pixels, num_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[p, c] = act(scale * x[c, p] + shift), and zeros beyond the channels of x."""
    _pack(
        x_ptr, scale_ptr, shift_ptr, out_ptr, num_pixels, num_channels, SILU, WIDTH, PIXELS,
        CHANNELS,
    )  # fmt: skip


@triton.jit
def causal_conv3d_pack_block_kernel(
    x_ptr, scale1_ptr, shift1_ptr, out1_ptr, hidden_ptr, scale2_ptr, shift2_ptr, out2_ptr,
    num_pixels, num_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The same of x and of hidden."""
    if tl.program_id(2) == 0:
        _pack(
            x_ptr, scale1_ptr, shift1_ptr, out1_ptr, num_pixels, num_channels, SILU, WIDTH, PIXELS,
            CHANNELS,
        )  # fmt: skip
    else:
        _pack(
            hidden_ptr, scale2_ptr, shift2_ptr, out2_ptr, num_pixels, num_channels, SILU, WIDTH,
            PIXELS, CHANNELS,
        )  # fmt: skip


@triton.jit
def _pack(
    x_ptr, scale_ptr, shift_ptr, out_ptr, num_pixels, num_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
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
        x = silu(x)
    out_ptr += (batch * num_pixels + p)[:, None] * WIDTH + c[None, :]
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=(p < num_pixels)[:, None])
