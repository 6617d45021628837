"""The state of a video that is convolved in pieces."""

from dataclasses import dataclass

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Plan, num_frames
from emu3_kernels.runtime.checks import describe


@dataclass(frozen=True)
class FrameCache:
    """The frames of earlier pieces that later outputs still need; ``FrameCache()`` starts a video.

    The frames are stored before norm and activation, which are applied to them again: the same
    numbers through the same arithmetic, so that the outputs are equal bit for bit.
    """

    frames: Tensor | None = None
    """``[B, C, n, H, W]``, n less than kt; None at the start."""
    padding: int = 0
    """Frames of zeros that are still ahead of ``frames``."""


def extend(cache: FrameCache, x: Tensor, kernel: int, stride: int) -> tuple[Tensor, int]:
    """Return ``x`` with the frames of ``cache`` ahead, and the frames of zeros ahead of both."""
    if cache.frames is None:
        return x, kernel - stride
    frames = cache.frames
    alike = frames.dim() == 5 and (_without_time(frames), frames.dtype, frames.device) == (
        (_without_time(x), x.dtype, x.device)
    )
    if not alike or not kernel - stride <= cache.padding + frames.shape[2] < kernel:
        raise ValueError(
            f"causal_conv3d: cache must come from a call with kernel {kernel} and stride {stride} "
            f"in time on frames like those of x, {describe(x)}, "
            f"got {describe(frames)} and {cache.padding} of padding"
        )
    return torch.cat([frames, x], dim=2), cache.padding


def remember(x: Tensor, kernel: int, plan: Plan) -> FrameCache:
    """Copy the frames that the outputs after those of ``x`` need."""
    done = num_frames(plan.front + x.shape[2], kernel, plan.stride[0]) * plan.stride[0]
    frames = x[:, :, max(0, done - plan.front) :].clone(memory_format=torch.contiguous_format)
    return FrameCache(frames, max(0, plan.front - done))


def _without_time(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:2], *x.shape[3:])
