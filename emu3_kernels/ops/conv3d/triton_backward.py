"""A causal convolution in Triton, backward; norm and activations are recomputed.

dx is a GEMM over the taps that read a pixel; where the stride is not 1, the pixels with the same
taps, a phase, share programs. dweight is a GEMM whose K are pixels, split into ranges that are
added in order.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import ALL, Needs, Plan
from emu3_kernels.ops.conv3d.triton_gemm import (
    column_sums,
    coordinates,
    gemm_dtype,
    gemm_tile,
    implicit_gemm,
    load_row,
    load_taps,
    pack_video,
    pack_weight,
    padded_channels,
    program_tile,
    silu_derivative,
    taps,
)
from emu3_kernels.runtime.launch import INTERPRETED, cdiv, gpu_of, launch


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
    needs: Needs = ALL,
) -> tuple[Tensor | None, ...]:
    if not dy.numel():
        given = (x, weight, bias, scale, shift)
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in given)
    dtype = gemm_dtype(x, weight)
    a = pack_video(x, scale, shift, plan.silu, dtype)
    if plan.post_silu:
        dz = _backward_z(dy, a, x, weight, bias, plan)
    else:
        dz = pack_video(dy, None, None, False, dtype)
    dx = dweight = dbias = dscale = dshift = None
    if needs.input:
        dx, dscale, dshift = _backward_x(dz, x, weight, scale, shift, dy.shape, plan)
    if needs.weight:
        dweight = _backward_weight(dz, a, x, weight, dy.shape, plan)
        dbias = None if bias is None else column_sums(dz.flatten(0, 1))[: len(bias)].to(bias.dtype)
    return dx, dweight, dbias, dscale, dshift


def _backward_z(
    dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """Return dz ``[B, pixels, channels]``: the gradient of the input of the SiLU after the bias."""
    num_pixels, width = dy[0, 0].numel(), padded_channels(dy.shape[1])
    dz = a.new_empty(len(dy), num_pixels, width)
    options = gemm_tile(x, a.dtype, num_pixels, weight.shape[0])
    packed = pack_weight(weight, a.dtype, options["BLOCK_N"])
    columns = packed.shape[2]
    blocks = cdiv(num_pixels, options["BLOCK_M"]) * (columns // options["BLOCK_N"])
    launch(
        causal_conv3d_bwd_z_kernel, (blocks * len(dy),), dy, a, packed, bias, dz, plan.front,
        *x.shape[2:], *dy.shape[1:], columns,
        WIDTH=width, CHANNELS=packed.shape[1], **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return dz


def _backward_x(
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
    of_phase = prod(cdiv(n, s) for n, s in zip(sizes, plan.stride, strict=True))
    # NumPy adds the rows of a block in sequence: for dscale and dshift as few as on a GPU.
    options = gemm_tile(x, dz.dtype, of_phase if scale is None else 0, channels)
    # x, its norm and the derivative of SiLU share the registers with the accumulator, and so do
    # addresses where the columns of a phase are not contiguous.
    options["BLOCK_N"] = min(options["BLOCK_N"], 64 if plan.stride[2] == 1 else 32)
    packed = pack_weight(weight.transpose(0, 1), dz.dtype, options["BLOCK_N"])
    columns, phases = packed.shape[2], prod(plan.stride)
    blocks = cdiv(of_phase, options["BLOCK_M"])
    sums = None
    if scale is not None:
        sums = dz.new_empty(batch * phases * blocks, 2, columns, dtype=torch.float32)
    launch(
        causal_conv3d_bwd_x_kernel, (blocks * (columns // options["BLOCK_N"]) * batch, phases),
        dz, packed, x, scale, shift, dx, sums, plan.front, channels, *sizes, *y_shape[2:], columns,
        SILU=plan.silu, CHANNELS=packed.shape[1], **taps(weight, plan.stride), **options,
    )  # fmt: skip
    if scale is None:
        return dx, None, None
    dscale, dshift = column_sums(sums.flatten(1)).view(2, columns)[:, :channels]
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


def _backward_weight(
    dz: Tensor, a: Tensor, x: Tensor, weight: Tensor, y_shape: torch.Size, plan: Plan
) -> Tensor:
    out_channels, channels = weight.shape[:2]
    num_taps, width = weight[0, 0].numel(), a.shape[2]
    options = gemm_tile(x, a.dtype, num_taps * width, out_channels)
    if INTERPRETED:
        options["BLOCK_K"] = 128
    elif a.dtype == torch.float32:
        options["BLOCK_K"] = 16  # 32 spill
    columns = cdiv(out_channels, options["BLOCK_N"]) * options["BLOCK_N"]
    tiles = cdiv(num_taps * width, options["BLOCK_M"]) * (columns // options["BLOCK_N"])
    steps = len(dz) * cdiv(dz.shape[1], options["BLOCK_K"])
    # Two programs a multiprocessor, and no range is empty.
    length = cdiv(steps, min(cdiv(2 * gpu_of(x).num_sms, tiles), steps))
    ranges = cdiv(steps, length)
    parts = a.new_empty(ranges, num_taps * width, columns, dtype=torch.float32)
    launch(
        causal_conv3d_bwd_weight_kernel, (tiles, ranges), a, dz, parts, plan.front, *x.shape[2:],
        *y_shape[2:], columns, steps, length,
        WIDTH=dz.shape[2], CHANNELS=width, **taps(weight, plan.stride), **options,
    )  # fmt: skip
    dweight = column_sums(parts.flatten(1)).view(num_taps, width, columns)
    dweight = dweight[:, :channels, :out_channels].permute(2, 1, 0).to(weight.dtype)
    return dweight.reshape(weight.shape)


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_bwd_z_kernel(
    dy_ptr, a_ptr, weight_ptr, bias_ptr, dz_ptr, front, frames, height, width,
    out_channels, y_frames, y_height, y_width, columns,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dz = dy * silu'(A @ weight + bias)."""
    num_pixels = y_frames * (y_height * y_width)
    batch, _, p, n = program_tile(num_pixels, columns, BLOCK_M, BLOCK_N)
    t, h, w = coordinates(p, y_height, y_width)
    a_ptr += batch * frames * height * width * CHANNELS
    z = implicit_gemm(
        a_ptr, weight_ptr, t * ST - front, h * SH - (KH - SH + 1) // 2,
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, KT, KH, KW, BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
    )  # fmt: skip
    inside, exists = (p < num_pixels)[:, None], n < out_channels
    if bias_ptr is not None:
        z += load_row(bias_ptr, n, exists)
    offsets = (batch * out_channels + n)[None, :] * num_pixels + p[:, None]
    dy = tl.load(dy_ptr + offsets, mask=inside & exists[None, :], other=0).to(tl.float32)
    dz_ptr += (batch * num_pixels + p)[:, None] * WIDTH + n[None, :]
    dz = (dy * silu_derivative(z)).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr, dz, mask=inside & (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_bwd_x_kernel(
    dz_ptr, weight_ptr, x_ptr, scale_ptr, shift_ptr, dx_ptr, sums_ptr, front, in_channels,
    frames, height, width, y_frames, y_height, y_width, columns,
    SILU: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = scale * du;  du = (dz @ weight) * act'(scale * x + shift);  sums of du * x and du."""
    rows_h, rows_w = tl.cdiv(height, SH), tl.cdiv(width, SW)
    num_pixels = tl.cdiv(frames, ST) * rows_h * rows_w
    batch, block, p, n = program_tile(num_pixels, columns, BLOCK_M, BLOCK_N)
    t, h, w = coordinates(p, rows_h, rows_w)
    phase = tl.program_id(1)
    # A pixel of the video is at stride * q + tap of its padded axis, for q of an output.
    at_t = phase // (SH * SW) + front
    at_h = phase // SW % SH + (KH - SH + 1) // 2
    at_w = phase % SW + (KW - SW + 1) // 2
    du = implicit_gemm(
        dz_ptr + batch * y_frames * y_height * y_width * CHANNELS, weight_ptr,
        t + at_t // ST, h + at_h // SH, w + at_w // SW, at_t % ST, at_h % SH, at_w % SW,
        n, columns, y_frames, y_height, y_width,
        -1, ST, SH, SW, CHANNELS, KT, KH, KW, BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
    )  # fmt: skip
    exists = n < in_channels
    inside = p < num_pixels
    if ST * SH * SW > 1:
        t, h, w = (
            t * ST + phase // (SH * SW), h * SH + phase // SW % SH, w * SW + phase % SW
        )  # fmt: skip
        inside &= (t < frames) & (h < height) & (w < width)
        p = (t * height + h) * width + w
    inside = inside[:, None] & exists[None, :]
    offsets = (batch * in_channels + n)[None, :] * (frames * height * width) + p[:, None]
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    du = tl.where(inside, du, 0)
    u = x
    if scale_ptr is not None:
        scale = load_row(scale_ptr, n, exists)
        u = x * scale + load_row(shift_ptr, n, exists)
    if SILU:
        du *= silu_derivative(u)
    if scale_ptr is not None:
        sums_ptr += ((batch * ST * SH * SW + phase) * tl.cdiv(num_pixels, BLOCK_M) + block) * (
            2 * columns
        )
        tl.store(sums_ptr + n, tl.sum(du * x, axis=0))
        tl.store(sums_ptr + columns + n, tl.sum(du, axis=0))
        du *= scale
    tl.store(dx_ptr + offsets, du.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_bwd_weight_kernel(
    a_ptr, dz_ptr, parts_ptr, front, frames, height, width, y_frames, y_height, y_width,
    columns, num_steps, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part = A.T @ dz over a range of blocks of pixels, BLOCK_K each; M are taps times channels."""
    num_n = columns // BLOCK_N
    m = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j, c = m // CHANNELS, m % CHANNELS
    kt, kh, kw = j // (KH * KW), j // KW % KH, j % KW
    num_pixels = y_frames * (y_height * y_width)
    num_blocks = tl.cdiv(num_pixels, BLOCK_K)
    part = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((part + 1) * length, num_steps)
    for step in tl.range(part * length, last, num_stages=STAGES):
        batch = (step // num_blocks).to(tl.int64)
        p = step % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        t, h, w = coordinates(p, y_height, y_width)
        a = load_taps(
            a_ptr + batch * frames * height * width * CHANNELS,
            t * ST - front, h * SH - (KH - SH + 1) // 2, w * SW - (KW - SW + 1) // 2,
            kt, kh, kw, c, kt < KT, frames, height, width, CHANNELS, 1,
        )  # fmt: skip
        inside = (p < num_pixels)[:, None] & (n < WIDTH)[None, :]
        offsets = (batch * num_pixels + p)[:, None] * WIDTH + n[None, :]
        dz = tl.load(dz_ptr + offsets, mask=inside, other=0)
        acc = tl.dot(a.T, dz, acc, input_precision="ieee")
    parts_ptr += (part.to(tl.int64) * KT * KH * KW * CHANNELS + m)[:, None] * columns + n[None, :]
    tl.store(parts_ptr, acc, mask=(kt < KT)[:, None])
