"""The temporal layers, on clips of latents ``x [B, D, T, H, W]``: causal in time.

With a ``memory`` they continue the video's last piece; without, the clip is padded with zeros.
"""

from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3_kernels.modules import CausalConv3d, Memory


def num_doublings(settings: VisionSettings) -> int:
    """How often the frames are halved, and doubled again."""
    return settings.temporal_factor.bit_length() - 1


class CausalConv(nn.Module):
    """A causal convolution that keeps the channels, under its official name."""

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
