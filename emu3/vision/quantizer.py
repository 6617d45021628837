"""Latents to the nearest code. ``N`` codes, ``D`` code width; latents are ``[B, D, ...]``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.config import VisionSettings
from emu3_kernels import nearest_code

RUNNING_MEANS = ("quantize.cluster_size", "quantize.sums")
"""Names in a tokenizer's state dict of the buffers that only training needs."""


class Quantizer(nn.Module):
    """Nearest code of every latent, with straight-through gradients.

    The codebook is trained by gradient, or, with ``ema_decay``, is the running mean of the latents
    assigned to each code, without an optimizer; dead codes then move to random latents of the
    current batch.
    """

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.num_codes, settings.code_width)
        if settings.ema_decay is None:
            nn.init.uniform_(self.embedding.weight, -1 / settings.num_codes, 1 / settings.num_codes)
        else:
            self.embedding.requires_grad_(False)
            self.register_buffer("cluster_size", torch.empty(settings.num_codes))
            self.register_buffer("sums", torch.empty(settings.num_codes, settings.code_width))
            self.restart()

    def restart(self) -> None:
        """Reset the running means: every cluster has size 1, its code alone."""
        if self.settings.ema_decay is not None:
            self.cluster_size.fill_(1.0)
            self.sums.copy_(self.embedding.weight)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized latent, the codes and the squared distance between latent and code.

        The gradient is straight-through. The gradient of the distance moves latents to their codes
        and, if the codebook is trained by gradient, codes to their latents. In training the running
        means are updated after the codes are looked up.
        """
        codes = self.codes(latent)
        quantized = self.lookup(codes)
        commitment = F.mse_loss(latent, quantized)
        if self.training and self.settings.ema_decay is not None:
            self._update_codebook(latent.detach(), codes)
        return latent + (quantized - latent).detach(), codes, commitment

    def codes(self, latent: Tensor) -> Tensor:
        """``[B, ...]`` int64."""
        return nearest_code(latent.detach(), self.embedding.weight.detach())

    def lookup(self, codes: Tensor) -> Tensor:
        """``[B, D, ...]`` code vectors of ``codes [B, ...]``, integers of any width."""
        return self.embedding(codes.long()).movedim(-1, 1)

    @torch.no_grad()
    def _update_codebook(self, latent: Tensor, codes: Tensor) -> None:
        s = self.settings
        rows = latent.movedim(1, -1).reshape(-1, s.code_width).to(self.sums.dtype)
        counts = torch.bincount(codes.flatten(), minlength=s.num_codes).to(rows.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes.flatten(), rows)
        self.cluster_size.lerp_(counts, 1 - s.ema_decay)
        self.sums.lerp_(sums, 1 - s.ema_decay)
        average = len(rows) / s.num_codes
        samples = rows[torch.randint(len(rows), (s.num_codes,), device=rows.device)]
        dead = self.cluster_size < s.dead_code_threshold * average
        self.cluster_size[dead] = average
        self.sums[dead] = average * samples[dead]
        # A code without a latent is kept: its running means both decay, in the end to 0 / 0.
        means = self.sums / self.cluster_size[:, None]
        means = torch.where(counts[:, None] > 0, means, self.embedding.weight)
        self.embedding.weight.copy_(torch.where(dead[:, None], samples, means))
