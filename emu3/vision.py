"""A small convolutional VQ tokenizer: pictures in [-1, 1] to codes and back.

``B`` batch, ``C`` channels, ``N`` codes, ``D`` code width; the latent is ``[B, D, h, w]``.
The codebook follows running means of the latents assigned to each code, so that it needs no
optimizer; codes that starve move to latents of the current batch.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3_kernels import nearest_code


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind group norms, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Quantizer(nn.Module):
    """Nearest code of every latent, with straight-through gradients."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.settings = settings
        shape = settings.num_codes, settings.code_width
        self.register_buffer("codebook", torch.randn(shape))
        self.register_buffer("members", torch.ones(settings.num_codes))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized latent, the codes and the commitment loss.

        The gradient passes the rounding unchanged. In training the codebook is updated in
        place, after it was read.
        """
        codes = nearest_code(latent.detach(), self.codebook)
        quantized = self.lookup(codes)
        commitment = F.mse_loss(latent, quantized)
        if self.training:
            self._follow(latent.detach(), codes)
        return latent + (quantized - latent).detach(), codes, commitment

    def lookup(self, codes: Tensor) -> Tensor:
        """``[B, D, h, w]`` code vectors of ``codes [B, h, w]``."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def _follow(self, latent: Tensor, codes: Tensor) -> None:
        s = self.settings
        rows = latent.movedim(1, -1).reshape(-1, s.code_width)
        chosen = F.one_hot(codes.flatten(), s.num_codes).to(rows.dtype)
        self.members.lerp_(chosen.sum(0), 1 - s.ema_decay)
        self.sums.lerp_(chosen.T @ rows, 1 - s.ema_decay)
        drawn = rows[torch.randint(len(rows), (s.num_codes,), device=rows.device)]
        starved = self.members < s.revive_below
        self.members[starved] = 1.0
        self.sums[starved] = drawn[starved]
        self.codebook.copy_(self.sums / self.members[:, None])


class VisionTokenizer(nn.Module):
    """Encoder, quantizer and decoder; every stage halves or doubles the side."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.settings = settings
        widths = (3, *settings.channels)
        stages = list(pairwise(widths))
        self.encoder = nn.Sequential(
            *(_down(narrow, wide) for narrow, wide in stages),
            ResidualBlock(widths[-1]),
            nn.Conv2d(widths[-1], settings.code_width, 1),
        )
        self.quantizer = Quantizer(settings)
        self.decoder = nn.Sequential(
            nn.Conv2d(settings.code_width, widths[-1], 3, padding=1),
            ResidualBlock(widths[-1]),
            *(_up(wide, narrow) for narrow, wide in reversed(stages[1:])),
            *_to_picture(widths[1]),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, the codes and the commitment loss of ``[B, 3, H, W]``."""
        quantized, codes, commitment = self.quantizer(self.encoder(images))
        return self.decoder(quantized), codes, commitment

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` int64 of pictures ``[B, 3, H, W]`` in [-1, 1]."""
        size = self.settings.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"VisionTokenizer: images must be [B, 3, {size}, {size}], got {tuple(images.shape)}"
            )
        return nearest_code(self.encoder(images), self.quantizer.codebook)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] of ``codes [B, h, w]``."""
        return self.decoder(self.quantizer.lookup(codes)).clamp(-1, 1)


def _down(narrow: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(narrow, wide, 4, stride=2, padding=1), ResidualBlock(wide))


def _up(wide: int, narrow: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(wide, narrow, 3, padding=1),
        ResidualBlock(narrow),
    )


def _to_picture(channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )
