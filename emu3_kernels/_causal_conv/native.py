"""A causal convolution on the CPU: csrc/cpu/causal_conv.cpp, causal_conv_gradient.cpp.

The kernels take weights and vectors in float32 and give their gradients so.
"""

import torch
from torch import Tensor

from emu3_kernels import _native
from emu3_kernels._causal_conv.plan import Plan, out_shape

MOST_ROW_TAPS, MOST_COLUMN_TAPS = 64, 16


def why_not(x: Tensor, weight: Tensor) -> str | None:
    frames, rows, columns = weight.shape[2:]
    if frames * rows > MOST_ROW_TAPS or columns > MOST_COLUMN_TAPS:
        return f"a kernel of {(frames, rows, columns)} is left to the reference"
    return _native.why_not_cpu(x)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    operands = widened(weight, bias, scale, shift)
    return torch.ops.emu3_kernels.causal_conv_forward(x, *operands, residual, *plan)


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    operands = widened(weight, bias, scale, shift)
    dx, dweight, dbias, dnorm = torch.ops.emu3_kernels.causal_conv_backward(dy, x, *operands, *plan)
    dweight = dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    if scale is None:
        return dx, dweight, dbias, None, None
    return dx, dweight, dbias, dnorm[0].to(scale.dtype), dnorm[1].to(shift.dtype)


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


if not _native.MISSING:

    @torch.library.register_fake("emu3_kernels::causal_conv_forward")
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        stride: list[int],
        front: int,
        silu: bool,
        post_silu: bool,
    ) -> Tensor:
        return x.new_empty(out_shape(x, weight, Plan(tuple(stride), front)))

    @torch.library.register_fake("emu3_kernels::causal_conv_backward")
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, *_settings: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = {"dtype": torch.float32}
        return (
            x.new_empty(x.shape),
            weight.new_empty(weight.shape, **wide),
            weight.new_empty(weight.shape[0], **wide),
            x.new_empty(2, x.shape[1], **wide),
        )
