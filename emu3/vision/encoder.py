"""Pixels to latents: images one by one, then four frames to one."""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3.vision.blocks import Downsample, Middle, Stage
from emu3.vision.temporal import TemporalConv, num_doublings
from emu3_kernels.modules import GroupNormSiLU, Memory, TemporalResidual


class Encoder(nn.Module):
    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        widths, norm = settings.widths, partial(GroupNormSiLU, settings.groups)
        self.conv_in = nn.Conv2d(3, settings.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Stage(
                narrow,
                wide,
                norm,
                num_blocks=settings.num_res_blocks,
                attend=number in settings.attention_stages,
            )
            for number, (narrow, wide) in enumerate(pairwise((settings.base_channels, *widths)))
        )
        for stage, width in zip(self.down[:-1], widths[:-1], strict=True):
            stage.downsample = Downsample(width)
        self.mid = Middle(widths[-1], norm)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], settings.code_width, 3, padding=1)
        doublings = num_doublings(settings)
        self.time_conv = nn.ModuleList(
            TemporalConv(settings.code_width, (4, 3, 3), stride=2) for _ in range(doublings)
        )
        self.time_res_stack = nn.ModuleList(
            TemporalResidual(settings.code_width)
            for _ in range(settings.num_res_blocks if doublings else 0)
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Latents ``[N, D, h, w]`` of images ``[N, 3, H, W]``, each by itself."""
        x = self.conv_in(frames)
        for stage in self.down[:-1]:
            x = stage.downsample(stage(x))
        x = self.mid(self.down[-1](x))
        return self.conv_out(self.norm_out(x))

    def join(self, latents: Tensor, memory: Memory | None = None) -> Tensor:
        """``[B, D, t, h, w]``, a frame for every ``temporal_factor`` of ``latents``."""
        for conv in self.time_conv:
            latents = conv(latents, memory)
        for block in self.time_res_stack:
            latents = block(latents, memory)
        return latents
