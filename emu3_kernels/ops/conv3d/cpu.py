"""A causal convolution natively: csrc/cpu/causal_conv.cpp, causal_conv_gradient.cpp, and forward in
csrc/cuda/causal_conv.cuh, temporal_residual.cuh.

The kernels take vectors in float32, weights in float32 or, on the CPU, bfloat16; gradients of both
are float32.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import EVERY, Plan, Wanted, out_shape
from emu3_kernels.runtime import library
from emu3_kernels.runtime.autograd import needs_gradient

MOST_ROW_TAPS, MOST_COLUMN_TAPS = 64, 16
MOST_CHANNELS = 64
"""Up to here native is the faster (``cases.TIME``); beyond, oneDNN has the rate."""


HAS_CUDA_KERNEL = not library.MISSING and torch._C._dispatch_has_kernel_for_dispatch_key(
    "emu3_kernels::causal_conv_forward", "CUDA"
)
MOST_CUDA_CHANNELS = 16


def why_not(x: Tensor, weight: Tensor, plan: Plan, *others: Tensor | None) -> str | None:
    """Say why there is no kernel for the call; ``others`` are what may need a gradient too."""
    if x.is_cuda and HAS_CUDA_KERNEL:
        return _why_not_cuda(x, weight, plan, *others)
    frames, rows, columns = weight.shape[2:]
    if frames * rows > MOST_ROW_TAPS or columns > MOST_COLUMN_TAPS:
        return f"a kernel of {(frames, rows, columns)} is left to the reference"
    if max(weight.shape[:2]) > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels are left to the reference"
    return library.why_not_cpu(x)


def _why_not_cuda(x: Tensor, weight: Tensor, plan: Plan, *others: Tensor | None) -> str | None:
    if x.dtype not in library.DTYPES:
        return f"{x.dtype} is left to the others"
    if max(weight.shape[:2]) > MOST_CUDA_CHANNELS:
        return f"more than {MOST_CUDA_CHANNELS} channels are for tensor cores"
    in_space = tuple(weight.shape[3:])
    if in_space not in ((1, 1), (3, 3)) or plan.stride[1:] != (1, 1):
        return f"a kernel of {in_space} at stride {plan.stride[1:]} in space is left to the others"
    if needs_gradient(*(t for t in (x, weight, *others) if t is not None)):
        return "the CUDA kernel has no gradient"
    return None


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    operands = factors(x, weight), *widened(bias, scale, shift)
    return torch.ops.emu3_kernels.causal_conv_forward(x, *operands, residual, *plan)


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: Plan,
    wanted: Wanted = EVERY,
) -> tuple[Tensor | None, ...]:
    operands = factors(x, weight), *widened(bias, scale, shift)
    dx, dweight, dbias, dnorm = torch.ops.emu3_kernels.causal_conv_backward(
        dy, x, *operands, *plan, *wanted
    )
    if wanted.weight:
        dweight = dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
    if not wanted.input or scale is None:
        return dx, dweight, dbias, None, None
    return dx, dweight, dbias, dnorm[0].to(scale.dtype), dnorm[1].to(shift.dtype)


def factors(x: Tensor, weight: Tensor) -> Tensor:
    """Return the weight as the kernels take it; as bfloat16 it is multiplied faster."""
    return weight if x.is_cpu and weight.dtype == torch.bfloat16 else weight.float()


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


if not library.MISSING:

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
        wide = {"dtype": torch.float32}
        return (
            x.new_empty(x.shape) if of_input else None,
            weight.new_empty(weight.shape, **wide) if of_weight else None,
            weight.new_empty(weight.shape[0], **wide) if of_weight else None,
            x.new_empty(2, x.shape[1], **wide) if of_input else None,
        )
