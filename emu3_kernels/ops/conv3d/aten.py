"""Wide causal convolutions on a GPU by PyTorch's own, cuDNN's, in 16 bits and without a gradient.

On channels-last operands they run at 468 TFLOP/s, against 119 of our GEMM (256 channels, measured
on an H200). A kernel of ours norms, activates and pads before, another adds bias and residual.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.conv3d.padding import finish, pad_video
from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import why_not_triton

FEWEST_CHANNELS = 64
"""In and out: below, the tensor cores of cuDNN are mostly padding."""


def why_not(x: Tensor, weight: Tensor, *rest: Tensor | Plan | None) -> str | None:
    *others, plan = rest
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"x of {x.dtype} and weights of {weight.dtype} are left to the others"
    if min(weight.shape[:2]) < FEWEST_CHANNELS:
        return f"fewer than {FEWEST_CHANNELS} channels are left to the others"
    if plan.is_piece:
        return "the algorithm depends on the size: a piece would not have the bits of the whole"
    if needs_gradient(*(t for t in (x, weight, *others) if t is not None)):
        return "our kernels around it have no gradient"
    return why_not_triton(x)


def convolve(
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
    shape = out_shape(x, weight, plan)
    if 0 in shape:
        return x.new_empty(shape)
    padded = pad_video(x, weight.shape[2:], scale, shift, plan)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    y = F.conv3d(padded, weight, stride=stride)
    if bias is None and residual is None and not plan.post_silu:
        return y
    return finish(y, bias, residual, plan.post_silu)


BACKENDS = {"causal_conv3d": Backend(why_not, function=convolve)}
