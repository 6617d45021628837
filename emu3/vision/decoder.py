"""Code vectors to pixels: one frame to four, then images one by one."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3.vision.blocks import Middle, Stage, Upsample
from emu3.vision.temporal import TemporalConv, num_doublings
from emu3_kernels.modules import Memory, SpatialNormSiLU, TemporalResidual


class Decoder(nn.Module):
    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        latent_width, widths = settings.code_width, settings.widths
        norm = partial(SpatialNormSiLU, settings.groups, latent_width=latent_width)
        doublings = num_doublings(settings)
        self.time_res_stack = nn.ModuleList(
            TemporalResidual(latent_width)
            for _ in range(settings.num_res_blocks if doublings else 0)
        )
        self.time_conv = nn.ModuleList(
            TemporalConv(latent_width, (3, 3, 3)) for _ in range(doublings)
        )
        self.conv_in = nn.Conv2d(latent_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm)
        self.up = nn.ModuleList(
            Stage(
                wide,
                narrow,
                norm,
                num_blocks=settings.num_res_blocks + 1,
                attend=number in settings.attention_stages,
            )
            for number, (narrow, wide) in enumerate(pairwise((*widths, widths[-1])))
        )
        for stage, width in zip(self.up[1:], widths[1:], strict=True):
            stage.upsample = Upsample(width)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def part(self, x: Tensor, latents: Tensor, *, is_image: bool, memory: Memory | None) -> tuple:
        """Upsample both ``[B, D, t, h, w]`` to ``temporal_factor * t`` frames.

        An image (``is_image``) needs the first frame only, which depends on no repetition.
        """
        both = torch.cat((x, latents))
        for block in self.time_res_stack:
            both = block(both, memory)
        for conv in self.time_conv:
            both = conv(both if is_image else both.repeat_interleave(2, dim=2), memory)
        return both.chunk(2)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` of ``x`` and ``latents [N, D, h, w]``, each by itself."""
        x = self.mid(self.conv_in(x), latents)
        for stage in list(self.up[1:])[::-1]:
            x = stage.upsample(stage(x, latents))
        x = self.norm_out(self.up[0](x, latents), latents)
        return self.conv_out(x)
