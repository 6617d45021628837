"""The causal convolutions in Triton: the forward pass, and the residual block.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d import block
from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.ops.conv3d.triton_backward import backward
from emu3_kernels.ops.conv3d.triton_gemm import (
    coordinates,
    gemm_dtype,
    gemm_tile,
    implicit_gemm,
    load_row,
    pack_video,
    pack_weight,
    program_tile,
    taps,
)
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, why_not_triton

MOST_PIXELS = 2**30
"""Of one video: the index of a pixel, and of one past the last block, is an int32."""


def why_not(x: Tensor, *rest: Tensor | Plan | None) -> str | None:
    tensors = [tensor for tensor in (x, *rest) if isinstance(tensor, Tensor)]
    reason = next(filter(None, map(why_not_triton, tensors)), None)
    if reason is None and x.shape[2:].numel() >= MOST_PIXELS:
        got = x.shape[2:].numel()
        return f"the kernels take less than {MOST_PIXELS} pixels of a video, got {got}"
    return reason


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    y = x.new_empty(out_shape(x, weight, plan))
    if y.numel():
        dtype = gemm_dtype(x, weight)
        num_pixels = y[0, 0].numel()
        options = gemm_tile(x, dtype, num_pixels, weight.shape[0])
        packed = pack_weight(weight, dtype, options["BLOCK_N"])
        columns = packed.shape[2]
        blocks = cdiv(num_pixels, options["BLOCK_M"]) * (columns // options["BLOCK_N"])
        launch(
            causal_conv3d_fwd_kernel, (blocks * len(y),),
            pack_video(x, scale, shift, plan.silu, dtype), packed, bias, residual, y,
            plan.front, *x.shape[2:], *y.shape[1:], columns,
            POST_SILU=plan.post_silu, CHANNELS=packed.shape[1], **taps(weight, plan.stride),
            **options,
        )  # fmt: skip
    return y


def block_forward(*tensors: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    return block.forward(forward, *tensors)


def block_backward(*args: Tensor | tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return block.backward(backward, *args)


@triton.jit(do_not_specialize=["front", "frames", "y_frames"])
def causal_conv3d_fwd_kernel(
    a_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, front, frames, height, width,
    out_channels, y_frames, y_height, y_width, columns,
    POST_SILU: tl.constexpr, CHANNELS: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = post(A @ weight + bias) + residual."""
    num_pixels = y_frames * (y_height * y_width)
    batch, _, p, n = program_tile(num_pixels, columns, BLOCK_M, BLOCK_N)
    t, h, w = coordinates(p, y_height, y_width)
    a_ptr += batch * frames * height * width * CHANNELS
    y = implicit_gemm(
        a_ptr, weight_ptr, t * ST - front, h * SH - (KH - SH + 1) // 2,
        w * SW - (KW - SW + 1) // 2, 0, 0, 0, n, columns, frames, height, width,
        1, 1, 1, 1, CHANNELS, KT, KH, KW, BLOCK_M, BLOCK_K, BLOCK_N, STAGES,
    )  # fmt: skip
    exists = n < out_channels
    if bias_ptr is not None:
        y += load_row(bias_ptr, n, exists)
    if POST_SILU:
        y *= tl.sigmoid(y)
    offsets = (batch * out_channels + n)[None, :] * num_pixels + p[:, None]
    inside = (p < num_pixels)[:, None] & exists[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


BACKENDS = {
    "causal_conv3d": Backend(why_not, forward, backward),
    "temporal_residual": Backend(why_not, block_forward, block_backward),
}
