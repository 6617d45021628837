"""Channels-last memory: a view of a tensor that has it, one copy of a tensor that has not."""

from torch import Tensor


def to_channels_last(x: Tensor) -> Tensor:
    """``[B, C, ...]`` as contiguous ``[B, ..., C]``."""
    return x.movedim(1, -1).contiguous()


def from_channels_last(x: Tensor) -> Tensor:
    """``[B, ..., C]`` as ``[B, C, ...]``, still channels-last in memory."""
    return x.movedim(-1, 1)


def with_frames(x: Tensor) -> Tensor:
    """View an image ``[B, H, W, C]`` as a video ``[B, 1, H, W, C]``; return a video as it is."""
    return x if x.dim() == 5 else x.unsqueeze(1)
