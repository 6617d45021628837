"""The definition of a causal convolution in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, out_shape, space_pads


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute)
    if scale is not None:
        y = y * _per_channel(scale, compute) + _per_channel(shift, compute)
    if plan.silu:
        y = F.silu(y)
    # Zeros behind let F.conv3d run where an axis is too short for one result: they give none.
    pads = [(plan.front, max(0, weight.shape[2] - plan.front - x.shape[2]))]
    for axis in (1, 2):
        before, after = space_pads(weight.shape[2 + axis], plan.stride[axis])
        pads.append((before, max(after, weight.shape[2 + axis] - before - x.shape[2 + axis])))
    y = F.pad(y, [pad for pair in reversed(pads) for pad in pair])
    y = F.conv3d(y, weight.to(compute), None if bias is None else bias.to(compute), plan.stride)
    frames, height, width = out_shape(x, weight, plan)[2:]
    y = y[:, :, :frames, :height, :width]
    if plan.post_silu:
        y = F.silu(y)
    if residual is not None:
        y = y + residual.to(compute)
    return y.to(x.dtype)


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None, None, None]
