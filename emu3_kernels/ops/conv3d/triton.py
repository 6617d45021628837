"""The causal convolutions in Triton: the forward pass, and the residual block.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d import block
from emu3_kernels.ops.conv3d.plan import Plan, out_shape, volume
from emu3_kernels.ops.conv3d.triton_backward import backward, gradients
from emu3_kernels.ops.conv3d.triton_gemm import (
    WeightLayout,
    coordinates,
    gemm_dtype,
    gemm_tile,
    implicit_gemm,
    load_row,
    pack_block,
    pack_video,
    padded_channels,
    program_tile,
    taps,
    weight_layout,
    weight_operand,
)
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import (
    Gpu,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch_planned,
    plan_launch,
    planned,
    why_not_triton,
)
from emu3_kernels.runtime.triton_silu import silu

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MOST_PIXELS = 2**30
"""Of one video: the index of a pixel, and of one past the last block, is an int32."""


def why_not(x: Tensor, *rest: Tensor | Plan | None) -> str | None:
    for tensor in (x, *rest):
        if isinstance(tensor, Tensor) and (reason := why_not_triton(tensor)) is not None:
            return reason
    if (num_pixels := volume(x.shape)) >= MOST_PIXELS:
        return f"the kernels take less than {MOST_PIXELS} pixels of a video, got {num_pixels}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    y = x.new_empty(*out_shape(x, weight, plan))
    if y.numel():
        dtype = gemm_dtype(x, weight)
        a = pack_video(x, scale, shift, plan.silu, dtype)
        _gemm(a, x.shape, weight, bias, residual, y, y.shape, plan)
    return y


def _gemm(
    a: Tensor,
    x_shape: torch.Size,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    y_shape: torch.Size,
    plan: Plan,
    next_scale: Tensor | None = None,
    next_shift: Tensor | None = None,
    hidden: torch.dtype | None = None,
) -> None:
    """Write y to ``out``; with a next norm, the A operand of the next convolution of y instead."""
    layout, of_gemm = plan_gemm(x_shape, weight.shape, y_shape, a.dtype, plan, hidden, gpu_of(a))
    operand = weight_operand(weight, a.dtype, layout)
    launch_planned(
        causal_conv3d_fwd_kernel, of_gemm, a, operand, bias, residual, out, next_scale, next_shift
    )  # fmt: skip


@planned
def plan_gemm(
    x: torch.Size, weight: torch.Size, y: torch.Size, dtype: torch.dtype, plan: Plan,
    hidden: torch.dtype | None, gpu: Gpu,
) -> tuple[WeightLayout, LaunchPlan]:  # fmt: skip
    num_pixels = volume(y)
    options = gemm_tile(gpu, dtype, num_pixels, weight[0])
    layout = weight_layout(weight, options["BLOCK_N"])
    blocks = cdiv(num_pixels, options["BLOCK_M"]) * (layout.columns // options["BLOCK_N"])
    of_gemm = plan_launch(
        (blocks * y[0],), plan.front, *x[2:], *y[1:], layout.columns,
        POST_SILU=plan.post_silu, HIDDEN=_TYPES.get(hidden), OUT_WIDTH=padded_channels(y[1]),
        **layout.constants, **taps(weight, plan.stride), **options,
    )  # fmt: skip
    return layout, of_gemm


def block_forward(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, bias1: Tensor, scale2: Tensor,
    shift2: Tensor, weight2: Tensor, bias2: Tensor, *, keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = gemm_dtype(x, weight1)
    if keep_hidden or dtype != gemm_dtype(x, weight2) or not x.numel():
        tensors = x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2
        return block.forward(forward, *tensors)
    a = pack_video(x, scale1, shift1, True, dtype)
    a2, y = torch.empty_like(a), torch.empty_like(x)
    plan = block.PLAN
    _gemm(a, x.shape, weight1, bias1, None, a2, x.shape, plan, scale2, shift2, x.dtype)
    _gemm(a2, x.shape, weight2, bias2, x, y, x.shape, plan)
    return y, None


def block_backward(
    dy: Tensor, hidden: Tensor, needs: tuple[bool, ...], x: Tensor,
    scale1: Tensor, shift1: Tensor, weight1: Tensor, bias1: Tensor,
    scale2: Tensor, shift2: Tensor, weight2: Tensor, bias2: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if not (all(needs) and x.dtype == weight1.dtype == weight2.dtype and x.numel()):
        tensors = x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2
        return block.backward(backward, dy, hidden, needs, *tensors)
    plan = block.PLAN
    a, a2 = pack_block(x, scale1, shift1, hidden, scale2, shift2)
    dz = pack_video(dy, None, None, False, x.dtype)
    dz, dweight2, dbias2, dscale2, dshift2 = gradients(
        dz, a2, hidden, weight2, bias2, scale2, shift2, plan, x.shape, pack=True
    )
    dx, dweight1, dbias1, dscale1, dshift1 = gradients(
        dz, a, x, weight1, bias1, scale1, shift1, plan, x.shape, plus=dy
    )
    return dx, dscale1, dshift1, dweight1, dbias1, dscale2, dshift2, dweight2, dbias2


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_fwd_kernel(
    a_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, next_scale_ptr, next_shift_ptr, front,
    frames, height, width, out_channels, y_frames, y_height, y_width, columns,
    POST_SILU: tl.constexpr, HIDDEN: tl.constexpr, OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, IN_PLACE: tl.constexpr, N_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = post(A @ weight + bias) + residual; or, with a HIDDEN dtype of y, the next A of y."""
    num_pixels = y_frames * (y_height * y_width)
    batch, _, p, n = program_tile(num_pixels, columns, BLOCK_M, BLOCK_N)
    t, h, w = coordinates(p, y_height, y_width)
    a_ptr += batch * frames * height * width * CHANNELS
    y = implicit_gemm(
        a_ptr, weight_ptr, t * ST - front, h * SH - (KH - SH + 1) // 2,
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, out_channels, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, IN_PLACE, N_STRIDE, C_STRIDE, KT, KH, KW,
        BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
    )  # fmt: skip
    exists = n < out_channels
    if bias_ptr is not None:
        y += load_row(bias_ptr, n, exists)
    if POST_SILU:
        y = silu(y)
    inside = (p < num_pixels)[:, None]
    if HIDDEN is not None:
        y = y.to(HIDDEN).to(tl.float32)
        y = y * load_row(next_scale_ptr, n, exists) + load_row(next_shift_ptr, n, exists)
        y = silu(y).to(y_ptr.dtype.element_ty)
        y_ptr += (batch * num_pixels + p)[:, None] * OUT_WIDTH + n[None, :]
        tl.store(y_ptr, y, mask=inside & (n < OUT_WIDTH)[None, :])
    else:
        offsets = (batch * out_channels + n)[None, :] * num_pixels + p[:, None]
        inside = inside & exists[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


BACKENDS = {
    "causal_conv3d": Backend(why_not, forward, backward),
    "temporal_residual": Backend(why_not, block_forward, block_backward),
}
