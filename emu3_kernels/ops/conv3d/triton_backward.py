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
    WeightLayout,
    coordinates,
    gemm_dtype,
    gemm_tile,
    implicit_gemm,
    load_row,
    load_taps,
    pack_video,
    padded_channels,
    program_tile,
    taps,
    weight_layout,
    weight_operand,
)
from emu3_kernels.ops.conv3d.triton_sums import add_sums, has_few_rows
from emu3_kernels.runtime.launch import (
    INTERPRETED,
    Gpu,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch_planned,
    plan_launch,
    planned,
)
from emu3_kernels.runtime.triton_silu import silu_derivative


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
    needs: Needs = ALL,
    plus: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients; ``plus`` is added to dx before it is rounded."""
    if not dy.numel():
        given = (x, weight, bias, scale, shift)
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in given)
    dtype = gemm_dtype(x, weight)
    a = pack_video(x, scale, shift, plan.silu, dtype)
    if plan.post_silu:
        dz = _backward_z(dy, a, x, weight, bias, plan)
    else:
        dz = pack_video(dy, None, None, False, dtype)
    return gradients(dz, a, x, weight, bias, scale, shift, plan, dy.shape, needs, plus)


def gradients(
    dz: Tensor,
    a: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
    y_shape: torch.Size,
    needs: Needs = ALL,
    plus: Tensor | None = None,
    *,
    pack: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by those of the GEMM, ``dz``; with ``pack``, dx as the next ``dz``."""
    of_x, of_weight = plan_gradients(
        x.shape, weight.shape, y_shape, dz.dtype, bias is not None, scale is not None, plan, pack,
        gpu_of(x),
    )  # fmt: skip
    dx = sums = parts = None
    if needs.input:
        dx, sums = _backward_x(dz, x, weight, scale, shift, plus, of_x, pack)
    if needs.weight:
        shape, of_parts = of_weight
        parts = a.new_empty(*shape, dtype=torch.float32)
        launch_planned(causal_conv3d_bwd_weight_kernel, of_parts, a, dz, parts)
    return dx, *add_sums(sums, parts, dz, weight, bias, scale, shift)


def _backward_z(
    dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """Return dz ``[B, pixels, channels]``: the gradient of the input of the SiLU after the bias."""
    shape, layout, of_z = plan_z(dy.shape, x.shape, weight.shape, a.dtype, plan, gpu_of(x))
    dz = a.new_empty(*shape)
    operand = weight_operand(weight, a.dtype, layout)
    launch_planned(causal_conv3d_bwd_z_kernel, of_z, dy, a, operand, bias, dz)
    return dz


@planned
def plan_z(
    y: torch.Size, x: torch.Size, weight: torch.Size, dtype: torch.dtype, plan: Plan, gpu: Gpu
) -> tuple[tuple[int, int, int], WeightLayout, LaunchPlan]:
    batch, channels, *sizes = y
    num_pixels, width = volume(y), padded_channels(channels)
    options = gemm_tile(gpu, dtype, num_pixels, channels)
    layout = weight_layout(weight, options["BLOCK_N"])
    blocks = cdiv(num_pixels, options["BLOCK_M"]) * (layout.columns // options["BLOCK_N"])
    of_z = plan_launch(
        (blocks * batch,), plan.front, *x[2:], channels, *sizes, layout.columns,
        WIDTH=width, **layout.constants, **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return (batch, num_pixels, width), layout, of_z


@planned
def plan_gradients(
    x: torch.Size, weight: torch.Size, y: torch.Size, dtype: torch.dtype, has_bias: bool,
    has_norm: bool, plan: Plan, pack: bool, gpu: Gpu,
) -> tuple[tuple, tuple]:  # fmt: skip
    """Return what the kernels of dx and of dweight take: one look-up for both."""
    return (
        _plan_x(x, weight, y, dtype, has_norm, plan, pack, gpu),
        _plan_weight(x, weight, y, dtype, has_bias, plan, gpu),
    )


def _backward_x(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    plus: Tensor | None,
    of_x: tuple[tuple[int, int, int], WeightLayout, LaunchPlan],
    pack: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx, and for a norm the sums ``[rows, 2, N]`` of du * x and of du."""
    shape, layout, of_dx = of_x
    dx = torch.empty_like(dz if pack else x)
    sums = None if scale is None else dz.new_empty(*shape, dtype=torch.float32)
    operand = weight_operand(weight, dz.dtype, layout, transposed=True)
    launch_planned(causal_conv3d_bwd_x_kernel, of_dx, dz, operand, x, scale, shift, plus, dx, sums)
    return dx, sums


def _plan_x(
    x: torch.Size, weight: torch.Size, y: torch.Size, dtype: torch.dtype, has_norm: bool,
    plan: Plan, pack: bool, gpu: Gpu,
) -> tuple[tuple[int, int, int], WeightLayout, LaunchPlan]:  # fmt: skip
    """Return the shape of the sums too."""
    batch, channels, *sizes = x
    st, sh, sw = plan.stride
    of_phase = cdiv(sizes[0], st) * cdiv(sizes[1], sh) * cdiv(sizes[2], sw)
    # NumPy adds the rows of a block in sequence: for dscale and dshift as few as on a GPU.
    options = gemm_tile(gpu, dtype, 0 if has_norm else of_phase, channels)
    # x, its norm and the derivative of SiLU share the registers with the accumulator, and so do
    # addresses where the columns of a phase are not contiguous.
    options["BLOCK_N"] = min(options["BLOCK_N"], 64 if sw == 1 else 32)
    layout = weight_layout(weight, options["BLOCK_N"], transposed=True)
    columns, phases = layout.columns, st * sh * sw
    blocks = cdiv(of_phase, options["BLOCK_M"])
    of_x = plan_launch(
        (blocks * (columns // options["BLOCK_N"]) * batch, phases),
        plan.front, channels, *sizes, *y[2:], columns,
        SILU=plan.silu, PACK=pack, OUT_WIDTH=padded_channels(channels),
        **layout.constants, **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return (batch * phases * blocks, 2, columns), layout, of_x


def _plan_weight(
    x: torch.Size, weight: torch.Size, y: torch.Size, dtype: torch.dtype, has_bias: bool,
    plan: Plan, gpu: Gpu,
) -> tuple[tuple[int, int, int], LaunchPlan]:  # fmt: skip
    """Return the shape ``[ranges, taps * channels + 1, N]``; the last row is dbias of few M."""
    out_channels, width, num_taps = weight[0], padded_channels(weight[1]), volume(weight)
    options = gemm_tile(gpu, dtype, num_taps * width, out_channels)
    if INTERPRETED:
        options["BLOCK_K"] = 128
    elif dtype == torch.float32:
        options["BLOCK_K"] = 16  # 32 spill
    columns = cdiv(out_channels, options["BLOCK_N"]) * options["BLOCK_N"]
    tiles = cdiv(num_taps * width, options["BLOCK_M"]) * (columns // options["BLOCK_N"])
    steps = x[0] * cdiv(volume(y), options["BLOCK_K"])
    # Two programs a multiprocessor, and no range is empty.
    length = cdiv(steps, min(cdiv(2 * gpu.num_sms, tiles), steps))
    ranges = cdiv(steps, length)
    of_weight = plan_launch(
        (tiles, ranges), plan.front, *x[2:], *y[2:], columns, steps, length,
        WIDTH=padded_channels(out_channels), CHANNELS=width,
        SUM_DZ=has_bias and has_few_rows(weight), **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return (ranges, num_taps * width + 1, columns), of_weight


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
    dz_ptr, weight_ptr, x_ptr, scale_ptr, shift_ptr, plus_ptr, dx_ptr, sums_ptr, front,
    in_channels, frames, height, width, y_frames, y_height, y_width, columns,
    SILU: tl.constexpr, PACK: tl.constexpr, OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, IN_PLACE: tl.constexpr,
    N_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = scale * du + plus;  du = (dz @ weight) * act'(scale * x + shift).

    The sums over blocks of pixels of du * x and of du are stored beside it. With PACK, dx is
    stored as the dz of the convolution before, channels-last; strides are 1.
    """
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
    if plus_ptr is not None:
        du += tl.load(plus_ptr + offsets, mask=inside, other=0).to(tl.float32)
    if PACK:
        offsets = (batch * num_pixels + p)[:, None] * OUT_WIDTH + n[None, :]
        inside = (p < num_pixels)[:, None] & (n < OUT_WIDTH)[None, :]
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
