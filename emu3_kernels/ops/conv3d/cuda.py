"""The causal convolutions on a GPU in CUDA C++, for few channels and without a gradient.

csrc/cuda/conv3d/causal_conv.cuh, which reads parameters in float32 or bfloat16; a residual block is
two launches of it.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.runtime import library
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import Backend

# Asks the dispatcher alone; no GPU is touched.
HAS_KERNEL = not library.MISSING and torch._C._dispatch_has_kernel_for_dispatch_key(
    "emu3_kernels::causal_conv_forward", "CUDA"
)
MOST_CHANNELS = 16


def why_not(x: Tensor, weight: Tensor, *rest: Tensor | Plan | None) -> str | None:
    *others, plan = rest
    if not HAS_KERNEL:
        return library.MISSING or "the native library was built without CUDA"
    if not x.is_cuda:
        return f"no kernel for a {x.device.type} tensor"
    if x.dtype not in library.DTYPES:
        return f"{x.dtype} is left to the others"
    if max(weight.shape[:2]) > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels are for tensor cores"
    in_space = tuple(weight.shape[3:])
    if in_space not in ((1, 1), (3, 3)) or plan.stride[1:] != (1, 1):
        return f"a kernel of {in_space} at stride {plan.stride[1:]} in space is left to the others"
    if needs_gradient(*(t for t in (x, weight, *others) if t is not None)):
        return "the CUDA kernel has no gradient"
    return None


def why_not_block(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, *others: Tensor
) -> str | None:
    return why_not(x, weight1, scale1, shift1, *others, Plan())


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    parameters = map(_readable, (weight, bias, scale, shift))
    return torch.ops.emu3_kernels.causal_conv_forward(x, *parameters, residual, *plan.native)


def block_forward(x: Tensor, *parameters: Tensor, keep_hidden: bool) -> tuple[Tensor, None]:
    assert not keep_hidden  # why_not rejects a gradient
    return torch.ops.emu3_kernels.temporal_residual(x, *map(_readable, parameters)), None


def _readable(parameter: Tensor | None) -> Tensor | None:
    """Convert what the kernel cannot read, such as float16."""
    if parameter is None or parameter.dtype in library.DTYPES:
        return parameter
    return parameter.float()


BACKENDS = {
    "causal_conv3d": Backend(why_not, convolve),
    "temporal_residual": Backend(why_not_block, block_forward),
}
