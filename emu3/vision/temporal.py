"""The temporal layers, on clips of latents ``x [B, D, T, H, W]``: no frame sees a later one.

With a ``memory`` they take up a video where its last piece ended; without, before it there is
nothing but zeros.
"""

from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3_kernels.modules import CausalConv3d, Memory


def num_doublings(settings: VisionSettings) -> int:
    """How often the frames are halved, and doubled again."""
    return settings.temporal_factor.bit_length() - 1


class CausalConv(nn.Module):
    """One that keeps the width, under the name that the official weights have for it."""

    def __init__(
        self, channels: int, kernel: tuple[int, int, int], stride: int = 1, **activations: str
    ) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel, (stride, 1, 1), **activations)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.conv(x, memory)


class TemporalConv(nn.Module):
    """A causal convolution and SiLU."""

    def __init__(self, channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv(channels, kernel, stride, post_activation="silu")

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.conv(x, memory)
