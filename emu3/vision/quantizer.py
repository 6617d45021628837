"""Latents to the nearest code. ``N`` codes, ``D`` code width; latents are ``[B, D, ...]``."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from emu3.config import VisionSettings
from emu3_kernels import nearest_code

RUNNING_MEANS = ("quantize.cluster_size", "quantize.sums")
"""Names in a tokenizer's state dict of the buffers that only training needs."""


class Quantizer(nn.Module):
    """Nearest code of every latent, with straight-through gradients.

    The codebook is trained by gradient, or, with ``ema_decay``, is the running mean of the latents
    assigned to each code, without an optimizer; dead codes then move to random latents of the
    current batch. The means are those of all processes of the default process group, and are
    updated in every forward in training, or, after ``update_after``, once a step.
    """

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.settings = settings
        self._once_a_step = False
        self._seen: list[tuple[Tensor, Tensor]] = []  # latents and codes since the last update
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

    def update_after(self, optimizer: Optimizer) -> None:
        """Update the codebook after each step of ``optimizer``, no longer in every forward.

        Several forwards, as in gradient accumulation, then count as one batch, and gradient
        checkpointing recomputes with the codes of the forward.
        """
        self._once_a_step = True
        optimizer.register_step_post_hook(lambda *_: self._update_codebook())

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized latent, the codes and the squared distance between latent and code.

        The gradient is straight-through. The gradient of the distance moves latents to their codes
        and, if the codebook is trained by gradient, codes to their latents. In training the latents
        enter the running means after the codes are looked up, but not again where gradient
        checkpointing repeats the forward.

        Raises:
            RuntimeError: gradient checkpointing repeats a forward that has updated the codebook.
        """
        codes = self.codes(latent)
        quantized = self.lookup(codes)
        commitment = F.mse_loss(latent, quantized)
        if self.training and self.settings.ema_decay is not None:
            self._count(latent.detach(), codes)
        return latent + (quantized - latent).detach(), codes, commitment

    def codes(self, latent: Tensor) -> Tensor:
        """``[B, ...]`` int64."""
        return nearest_code(latent.detach(), self.embedding.weight.detach())

    def lookup(self, codes: Tensor) -> Tensor:
        """``[B, D, ...]`` code vectors of ``codes [B, ...]``, integers of any width."""
        return self.embedding(codes.long()).movedim(-1, 1)

    def _count(self, latent: Tensor, codes: Tensor) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # as torch.utils.module_tracker asks
        if in_backward and not self._once_a_step:
            raise RuntimeError(
                "Quantizer: under gradient checkpointing the codebook must be updated once a step: "
                "call update_after(optimizer)"
            )
        if in_backward:
            return
        rows = latent.movedim(1, -1).reshape(-1, self.settings.code_width).to(self.sums.dtype)
        self._seen.append((rows, codes.flatten()))
        if not self._once_a_step:
            self._update_codebook()

    @torch.no_grad()
    def _update_codebook(self) -> None:
        if not self._seen:
            return
        s = self.settings
        rows, codes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        counts = torch.bincount(codes, minlength=s.num_codes).to(rows.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)
        samples = rows[torch.randint(len(rows), (s.num_codes,), device=rows.device)]
        _all_reduce(counts, sums, samples)
        self.cluster_size.lerp_(counts, 1 - s.ema_decay)
        self.sums.lerp_(sums, 1 - s.ema_decay)
        average = int(counts.long().sum()) / s.num_codes
        dead = self.cluster_size < s.dead_code_threshold * average
        self.cluster_size[dead] = average
        self.sums[dead] = average * samples[dead]
        # A code without a latent is kept: its running means both decay, in the end to 0 / 0.
        means = self.sums / self.cluster_size[:, None]
        means = torch.where(counts[:, None] > 0, means, self.embedding.weight)
        self.embedding.weight.copy_(torch.where(dead[:, None], samples, means))


def _all_reduce(counts: Tensor, sums: Tensor, samples: Tensor) -> None:
    """Add up ``counts [N]`` and ``sums [N, D]`` of all ranks; each gives every n-th sample."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    owner = torch.arange(len(samples), device=samples.device) % dist.get_world_size()
    samples[owner != dist.get_rank()] = 0.0
    packed = torch.cat((counts[:, None], sums, samples), dim=1)
    dist.all_reduce(packed)
    width = sums.shape[1]
    counts.copy_(packed[:, 0])
    sums.copy_(packed[:, 1 : 1 + width])
    samples.copy_(packed[:, 1 + width :])
