"""The definitions of the causal convolutions in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, out_shape, space_pads


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    post_activation: str | None = None,
    residual: Tensor | None = None,
    front: int | None = None,
) -> Tensor:
    """Without a cache; ``front`` frames of zeros are ahead of ``x``, ``kt - stride_t`` if None."""
    if front is None:
        front = weight.shape[2] - stride[0]
    plan = Plan(stride, front, activation == "silu", post_activation == "silu")
    return _convolve(x, weight, bias, scale, shift, residual, plan)


def temporal_residual(
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    plan = Plan(silu=True)
    hidden = _convolve(x, weight1, bias1, scale1, shift1, None, plan)
    return _convolve(hidden, weight2, bias2, scale2, shift2, x, plan)


def _convolve(
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
    # Zeros behind let F.conv3d run on an axis too short for one output: it is cropped again.
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
