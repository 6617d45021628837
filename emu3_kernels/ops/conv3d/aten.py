"""Wide causal convolutions on a GPU by PyTorch's own, cuDNN's, in 16 bits, and their gradients.

On channels-last operands they run at 468 TFLOP/s, against 119 of our GEMM (256 channels, measured
on an H200). A kernel of ours norms, activates and pads before, another adds bias and residual, and
two take a gradient through both. cuDNN's gradients repeat bit for bit where
``torch.use_deterministic_algorithms`` or ``torch.backends.cudnn.deterministic`` ask for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.conv3d import block
from emu3_kernels.ops.conv3d.padding_triton import (
    CHANNELS_LAST,
    finish,
    finish_backward,
    pad_backward,
    pad_video,
)
from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import why_not_triton

FEWEST_CHANNELS = 64
"""In and out: below, the tensor cores of cuDNN are mostly padding."""


def why_not(x: Tensor, weight: Tensor, *rest: Tensor | Plan | None) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"x of {x.dtype} and weights of {weight.dtype} are left to the others"
    if min(weight.shape[:2]) < FEWEST_CHANNELS:
        return f"fewer than {FEWEST_CHANNELS} channels are left to the others"
    if rest[-1].is_piece:
        return "the algorithm depends on the size: a piece would not have the bits of the whole"
    return why_not_triton(x)


def why_not_block(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, *others: Tensor
) -> str | None:
    *_, weight2, _ = others
    return why_not(x, weight1, block.PLAN) or why_not(x, weight2, block.PLAN)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    post_activation: str | None,
    residual: Tensor | None,
    front: int,
) -> Tensor:
    plan = Plan(stride, front, activation == "silu", post_activation == "silu")
    return convolve(x, weight, bias, scale, shift, residual, plan)


def temporal_residual(*tensors: Tensor) -> Tensor:
    y, _ = block.forward(convolve, *tensors)
    return y


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    # The kernels read x and residual of any strides, but vectors one after the other.
    vectors = (None if v is None else v.contiguous() for v in (bias, scale, shift))
    inputs = x, weight, *vectors, residual
    if needs_gradient(*(tensor for tensor in inputs if tensor is not None)):
        return _CausalConv3d.apply(*inputs, plan)
    y, _ = _forward(*inputs, plan, keep=False)
    return y


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y, and what the convolution gave before bias and SiLU if it is to be kept."""
    shape = out_shape(x, weight, plan)
    if 0 in shape:
        return x.new_empty(shape), None
    padded = pad_video(x, weight.shape[2:], scale, shift, plan)
    z = F.conv3d(padded, weight.contiguous(memory_format=CHANNELS_LAST), stride=plan.stride)
    z = z.contiguous(memory_format=CHANNELS_LAST)
    y = z
    if bias is not None or residual is not None or plan.post_silu:
        y = finish(z, bias, residual, plan.post_silu, in_place=not keep)
    return y, z if keep else None


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, residual, plan):
        y, z = _forward(x, weight, bias, scale, shift, residual, plan, keep=plan.post_silu)
        ctx.save_for_backward(x, weight, bias, scale, shift, z)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *needed, of_residual, _ = ctx.needs_input_grad
        grads = _backward(dy, *ctx.saved_tensors, ctx.plan, needed)
        return *grads, dy if of_residual else None, None


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    z: Tensor | None,
    plan: Plan,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return a gradient for each of the five tensors from ``x`` on that is ``needed``, or None."""
    given = x, weight, bias, scale, shift
    if not dy.numel():
        return tuple(torch.zeros_like(t) if n else None for t, n in zip(given, needed, strict=True))
    if not any(needed):
        return (None,) * len(given)
    of_x, of_weight, of_bias, of_scale, of_shift = needed
    of_input = of_x or of_scale or of_shift
    dx = dweight = dscale = dshift = None
    dz, dbias = finish_backward(dy, z, bias, of_bias)
    if of_input or of_weight:
        dpadded, dweight, _ = torch.ops.aten.convolution_backward(
            dz,
            pad_video(x, weight.shape[2:], scale, shift, plan),
            weight.contiguous(memory_format=CHANNELS_LAST),
            None,
            plan.stride,
            (0, 0, 0),
            (1, 1, 1),
            False,
            (0, 0, 0),
            1,
            (of_input, of_weight, False),
        )
    if of_input:
        dpadded = dpadded.contiguous(memory_format=CHANNELS_LAST)
        dx, dscale, dshift = pad_backward(dpadded, x, weight, scale, shift, plan)
    return dx, dweight, dbias, dscale, dshift


BACKENDS = {
    "causal_conv3d": Backend(why_not, function=causal_conv3d),
    "temporal_residual": Backend(why_not_block, function=temporal_residual),
}
