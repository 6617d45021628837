"""The causal convolutions on the CPU: csrc/cpu/conv3d/causal_conv.cpp, causal_conv_gradient.cpp.

The kernels take vectors in float32 and weights in float32 or bfloat16; they return gradients of
both in float32.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d import block
from emu3_kernels.ops.conv3d.plan import ALL, Needs, Plan, out_shape
from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

MOST_ROW_TAPS, MOST_COLUMN_TAPS = 64, 16
MOST_CHANNELS = 64
"""Up to here these kernels are the fastest (the ``time`` sizes); beyond, oneDNN is."""


def why_not(x: Tensor, weight: Tensor, *_: Tensor | Plan | None) -> str | None:
    frames, rows, columns = weight.shape[2:]
    if frames * rows > MOST_ROW_TAPS or columns > MOST_COLUMN_TAPS:
        return f"a kernel of {(frames, rows, columns)} is left to the reference"
    if max(weight.shape[:2]) > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels are left to the reference"
    return library.why_not_cpu(x)


def why_not_block(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, *_: Tensor
) -> str | None:
    return why_not(x, weight1)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    parameters = _weight_dtype(weight), *_to_float32(bias, scale, shift)
    return torch.ops.emu3_kernels.causal_conv_forward(x, *parameters, residual, *plan.native)


def convolve_backward(
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
    """Return the gradients; ``plus`` is added to dx."""
    parameters = _weight_dtype(weight), *_to_float32(bias, scale, shift)
    dx, dweight, dbias, dnorm = torch.ops.emu3_kernels.causal_conv_backward(
        dy, x, *parameters, *plan.native, *needs
    )
    if plus is not None:
        dx.add_(plus)
    if needs.weight:
        dweight = dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
    if not needs.input or scale is None:
        return dx, dweight, dbias, None, None
    return dx, dweight, dbias, dnorm[0].to(scale.dtype), dnorm[1].to(shift.dtype)


def block_forward(
    x: Tensor, *parameters: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    if keep_hidden:
        return block.forward(convolve, x, *parameters)
    taken = [_weight_dtype(p) if p.dim() > 1 else p.float() for p in parameters]
    return torch.ops.emu3_kernels.temporal_residual(x, *taken), None


def block_backward(*args: Tensor | tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return block.backward(convolve_backward, *args)


def _weight_dtype(weight: Tensor) -> Tensor:
    """Return the weight in a dtype of the kernels: bfloat16, which is faster, or float32."""
    return weight if weight.dtype == torch.bfloat16 else weight.float()


def _to_float32(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


if not library.MISSING:
    # The forward ops have CUDA kernels too: one op, one kernel for each type of device.

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
    def _(dy: Tensor, x: Tensor, weight: Tensor, *settings: object) -> tuple[Tensor | None, ...]:
        *_, of_input, of_weight = settings
        sums = {"dtype": torch.float32}
        return (
            x.new_empty(x.shape) if of_input else None,
            weight.new_empty(weight.shape, **sums) if of_weight else None,
            weight.new_empty(weight.shape[0], **sums) if of_weight else None,
            x.new_empty(2, x.shape[1], **sums) if of_input else None,
        )

    @torch.library.register_fake("emu3_kernels::temporal_residual")
    def _(x: Tensor, *_weights: Tensor) -> Tensor:
        return x.new_empty(x.shape)


BACKENDS = {
    "causal_conv3d": Backend(why_not, convolve, convolve_backward),
    "temporal_residual": Backend(why_not_block, block_forward, block_backward),
}
