"""The temporal layers, on clips of latents ``x [B, D, T, H, W]``: no frame sees a later one.

With a ``memory`` they take up a video where its last piece ended; without, before it there is
nothing but zeros.
"""

import torch
from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3_kernels import FrameCache, causal_conv3d, temporal_residual

Memory = dict[nn.Module, FrameCache]
"""The frames that each convolution has still to see; start with an empty one."""


def num_doublings(settings: VisionSettings) -> int:
    """How often the frames are halved, and doubled again."""
    return settings.temporal_factor.bit_length() - 1


class CausalConv(nn.Module):
    """A convolution that pads time with zeros at the front alone."""

    def __init__(self, channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel, (stride, 1, 1))

    def forward(self, x: Tensor, memory: Memory | None = None, **fused) -> Tensor:
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride
        if memory is None:
            return causal_conv3d(x, weight, bias, stride=stride, **fused)
        cache = memory.setdefault(self, FrameCache())
        y, memory[self] = causal_conv3d(x, weight, bias, stride=stride, cache=cache, **fused)
        return y


class TemporalConv(nn.Module):
    """A causal convolution and SiLU."""

    def __init__(self, channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv(channels, kernel, stride)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.conv(x, memory, post_activation="silu")


class BatchNorm(nn.BatchNorm3d):
    """A norm by channel that is left to the next convolution, as a scale and a shift."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``scale, shift [D]``; in training they are of ``x``, and the running ones follow."""
        running = self.running_mean, self.running_var
        mean, variance = self._of_batch(x) if self.training else running
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3, 4), correction=0)
        count = x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        return mean, variance


class TemporalResBlock(nn.Module):
    """Two causal convolutions behind batch norms and SiLU, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(channels), BatchNorm(channels)
        self.conv1, self.conv2 = (CausalConv(channels, (3, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if not self.training and memory is None:
            first, second = self.conv1.conv, self.conv2.conv
            return temporal_residual(
                x,
                *self.norm1(x),
                first.weight,
                first.bias,
                *self.norm2(x),
                second.weight,
                second.bias,
            )
        change = self._normed(self.norm1, self.conv1, x, memory)
        return self._normed(self.norm2, self.conv2, change, memory, residual=x)

    @staticmethod
    def _normed(norm: BatchNorm, conv: CausalConv, x: Tensor, memory: Memory | None, **residual):
        scale, shift = norm(x)
        return conv(x, memory, scale=scale, shift=shift, activation="silu", **residual)
