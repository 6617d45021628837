"""A causal convolution in Triton, backward; norm and activations are recomputed.

dx is a GEMM over the taps that read a pixel; where the stride is not 1, the pixels with the same
taps, a phase, share programs. dweight is a GEMM whose K are pixels, split into ranges. One kernel
adds the ranges, and the sums for dscale and dshift, in order.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import ALL, Needs, Plan, volume
from emu3_kernels.ops.conv3d.triton_gemm import (
    MOST_IN_PLACE,
    column_sums,
    coordinates,
    gemm_dtype,
    gemm_tile,
    implicit_gemm,
    load_row,
    load_taps,
    pack_video,
    padded_channels,
    program_tile,
    silu_derivative,
    taps,
    weight_operand,
)
from emu3_kernels.runtime.launch import INTERPRETED, cdiv, gpu_of, launch, tile


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
    dx = sums = parts = None
    if needs.input:
        dx, sums = _backward_x(dz, x, weight, scale, shift, dy.shape, plan)
    if needs.weight:
        parts = _backward_weight(dz, a, x, weight, bias is not None, dy.shape, plan)
    return dx, *add_sums(sums, parts, dz, weight, bias, scale, shift)


def _backward_z(
    dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """Return dz ``[B, pixels, channels]``: the gradient of the input of the SiLU after the bias."""
    batch, channels, *sizes = dy.shape
    num_pixels, width = volume(dy), padded_channels(channels)
    dz = a.new_empty(batch, num_pixels, width)
    options = gemm_tile(x, a.dtype, num_pixels, weight.shape[0])
    operand = weight_operand(weight, a.dtype, options["BLOCK_N"])
    blocks = cdiv(num_pixels, options["BLOCK_M"]) * (operand.columns // options["BLOCK_N"])
    launch(
        causal_conv3d_bwd_z_kernel, (blocks * batch,), dy, a, operand.data, bias, dz, plan.front,
        *x.shape[2:], channels, *sizes, operand.columns,
        WIDTH=width, **operand.constants, **taps(weight, plan.stride), **options,
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
) -> tuple[Tensor, Tensor | None]:
    """Return dx, and for a norm the sums ``[rows, 2, N]`` of du * x and of du."""
    dx = torch.empty_like(x)
    batch, channels, *sizes = x.shape
    frames, height, width = sizes
    st, sh, sw = plan.stride
    of_phase = cdiv(frames, st) * cdiv(height, sh) * cdiv(width, sw)
    # NumPy adds the rows of a block in sequence: for dscale and dshift as few as on a GPU.
    options = gemm_tile(x, dz.dtype, of_phase if scale is None else 0, channels)
    # x, its norm and the derivative of SiLU share the registers with the accumulator, and so do
    # addresses where the columns of a phase are not contiguous.
    options["BLOCK_N"] = min(options["BLOCK_N"], 64 if plan.stride[2] == 1 else 32)
    operand = weight_operand(weight, dz.dtype, options["BLOCK_N"], transposed=True)
    columns, phases = operand.columns, st * sh * sw
    blocks = cdiv(of_phase, options["BLOCK_M"])
    sums = None
    if scale is not None:
        sums = dz.new_empty(batch * phases * blocks, 2, columns, dtype=torch.float32)
    launch(
        causal_conv3d_bwd_x_kernel, (blocks * (columns // options["BLOCK_N"]) * batch, phases),
        dz, operand.data, x, scale, shift, dx, sums, plan.front, channels, *sizes, *y_shape[2:],
        columns, SILU=plan.silu, **operand.constants, **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return dx, sums


def _backward_weight(
    dz: Tensor,
    a: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    y_shape: torch.Size,
    plan: Plan,
) -> Tensor:
    """Return ``[ranges, taps * channels + 1, N]``; the last row is dbias if there are few M."""
    out_channels, num_taps = weight.shape[0], volume(weight)
    (batch, num_pixels, channels), width = dz.shape, a.shape[2]
    options = gemm_tile(x, a.dtype, num_taps * width, out_channels)
    if INTERPRETED:
        options["BLOCK_K"] = 128
    elif a.dtype == torch.float32:
        options["BLOCK_K"] = 16  # 32 spill
    columns = cdiv(out_channels, options["BLOCK_N"]) * options["BLOCK_N"]
    tiles = cdiv(num_taps * width, options["BLOCK_M"]) * (columns // options["BLOCK_N"])
    steps = batch * cdiv(num_pixels, options["BLOCK_K"])
    # Two programs a multiprocessor, and no range is empty.
    length = cdiv(steps, min(cdiv(2 * gpu_of(x).num_sms, tiles), steps))
    ranges = cdiv(steps, length)
    parts = a.new_empty(ranges, num_taps * width + 1, columns, dtype=torch.float32)
    launch(
        causal_conv3d_bwd_weight_kernel, (tiles, ranges), a, dz, parts, plan.front, *x.shape[2:],
        *y_shape[2:], columns, steps, length, WIDTH=channels, CHANNELS=width,
        SUM_DZ=has_bias and _has_few_rows(weight), **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return parts


def _has_few_rows(weight: Tensor) -> bool:
    """Return whether a kernel that is short of registers can sum dz beside its GEMM."""
    out, channels, *_ = weight.shape
    return out <= MOST_IN_PLACE and channels <= MOST_IN_PLACE


def add_sums(
    sums: Tensor | None,
    parts: Tensor | None,
    dz: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return dweight, dbias, dscale, dshift; None where there are no sums."""
    dweight = dbias = dscale = dshift = None
    if parts is None and sums is None:
        return dweight, dbias, dscale, dshift
    out_channels, channels, *_ = weight.shape
    options = tile(num_warps=4, ROWS=16, BLOCK=64)
    blocks = num_sums = 0
    if parts is not None:
        dweight = torch.empty_like(weight)
        if bias is not None and _has_few_rows(weight):
            dbias = torch.empty_like(bias)
        blocks = cdiv(parts.shape[1] * parts.shape[2], options["BLOCK"])
    if sums is not None:
        dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
        num_sums = 2 * channels
    of_weight, of_norm = (sums if parts is None else parts), (parts if sums is None else sums)
    (num_ranges, _, weight_width), (num_rows, _, norm_width) = of_weight.shape, of_norm.shape
    launch(
        causal_conv3d_bwd_add_kernel, (blocks + num_sums,), of_weight, of_norm,
        dweight, dbias, dscale, dshift, num_ranges, num_rows, blocks,
        out_channels, channels, weight_width, norm_width,
        CHANNELS=padded_channels(channels), TAPS=volume(weight),
        HAS_PARTS=parts is not None, HAS_SUMS=sums is not None, **options,
    )  # fmt: skip
    if parts is not None and bias is not None and dbias is None:
        dbias = column_sums(dz.flatten(0, 1), bias.dtype)[: len(bias)]
    return dweight, dbias, dscale, dshift


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_bwd_z_kernel(
    dy_ptr, a_ptr, weight_ptr, bias_ptr, dz_ptr, front, frames, height, width,
    out_channels, y_frames, y_height, y_width, columns,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, IN_PLACE: tl.constexpr,
    N_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
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
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, out_channels, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, IN_PLACE, N_STRIDE, C_STRIDE, KT, KH, KW,
        BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
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
    SILU: tl.constexpr, CHANNELS: tl.constexpr, IN_PLACE: tl.constexpr,
    N_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
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
        n, in_channels, columns, y_frames, y_height, y_width,
        -1, ST, SH, SW, CHANNELS, IN_PLACE, N_STRIDE, C_STRIDE, KT, KH, KW,
        BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
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
    columns, num_steps, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SUM_DZ: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part = A.T @ dz over a range of blocks of pixels, BLOCK_K each; M are taps times channels.

    The sums of dz are the row after the last.
    """
    num_n = columns // BLOCK_N
    m = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j, c = m // CHANNELS, m % CHANNELS
    kt, kh, kw = j // (KH * KW), j // KW % KH, j % KW
    num_pixels = y_frames * (y_height * y_width)
    num_blocks = tl.cdiv(num_pixels, BLOCK_K)
    part = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
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
        if SUM_DZ:
            sums += dz.to(tl.float32)
    num_m = KT * KH * KW * CHANNELS
    parts_ptr += part.to(tl.int64) * (num_m + 1) * columns + n[None, :]
    tl.store(parts_ptr + m[:, None] * columns, acc, mask=(kt < KT)[:, None])
    if SUM_DZ:
        is_first = (m[:, None] == 0) & (n[None, :] < columns)
        row = tl.broadcast_to(tl.sum(sums, axis=0)[None, :], [BLOCK_M, BLOCK_N])
        tl.store(parts_ptr + num_m * columns + 0 * m[:, None], row, mask=is_first)


@triton.jit
def _add_parts(
    parts_ptr, dweight_ptr, dbias_ptr, num_parts, block, out_channels, in_channels, columns,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = (TAPS * CHANNELS + 1) * columns
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_parts, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_parts)[:, None] & (at < size)[None, :]
        total += tl.load(parts_ptr + row[:, None] * size + at[None, :], mask=inside, other=0)
    value = tl.sum(total, axis=0)
    n, m = at % columns, at // columns
    tap, c = m // CHANNELS, m % CHANNELS
    exists = (tap < TAPS) & (c < in_channels) & (n < out_channels)
    out = dweight_ptr + (n * in_channels + c) * TAPS + tap
    tl.store(out, value.to(dweight_ptr.dtype.element_ty), mask=exists)
    if dbias_ptr is not None:
        is_bias = (m == TAPS * CHANNELS) & (n < out_channels)
        tl.store(dbias_ptr + n, value.to(dbias_ptr.dtype.element_ty), mask=is_bias)


@triton.jit
def _add_sums(sums_ptr, dscale_ptr, dshift_ptr, num_sums, which, c, columns, BLOCK: tl.constexpr):
    # Few numbers that cancel: the sums of blocks have errors enough.
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_sums, BLOCK):
        row = first + tl.arange(0, BLOCK)
        at = (row.to(tl.int64) * 2 + which) * columns + c
        total += tl.load(sums_ptr + at, mask=row < num_sums, other=0).to(tl.float64)
    value = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dscale_ptr + c, value.to(dscale_ptr.dtype.element_ty))
    else:
        tl.store(dshift_ptr + c, value.to(dshift_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_parts", "num_sums", "blocks"])
def causal_conv3d_bwd_add_kernel(
    parts_ptr, sums_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr, num_parts, num_sums,
    blocks, out_channels, in_channels, columns, sums_columns,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias, the sums of parts, from the first programs; then dscale and dshift."""
    program = tl.program_id(0)
    if HAS_PARTS:  # noqa: SIM102 (known when compiled)
        if program < blocks:
            _add_parts(
                parts_ptr, dweight_ptr, dbias_ptr, num_parts, program, out_channels, in_channels,
                columns, CHANNELS, TAPS, ROWS, BLOCK,
            )  # fmt: skip
    if HAS_SUMS:  # noqa: SIM102
        if program >= blocks:
            which, c = (program - blocks) // in_channels, (program - blocks) % in_channels
            _add_sums(
                sums_ptr, dscale_ptr, dshift_ptr, num_sums, which, c, sums_columns, ROWS * BLOCK
            )
