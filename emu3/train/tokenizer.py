"""Training of Emu3's vision tokenizer on pictures and clips.

``loss = mean (drawn - real)^2 + a * perceptual + b * adversarial + c * commitment``, the terms of
Emu3 (arXiv 2409.18869, section 2.2) with the weights of MoVQGAN, from which it starts. Beside the
tokenizer a PatchGAN learns to tell reconstructions from pictures. A running mean of the
tokenizer's weights is what a run leaves.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emu3.config import Recipe
from emu3.train.adversary import PatchDiscriminator, discriminator_loss, generator_loss
from emu3.train.optim import build_optimizer, learning_rate, take_step
from emu3.train.stage import Figures, Stream
from emu3.train.usage import CodeUsage
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision
from emu3_kernels.modules import speed_up_bfloat16

Perceptual = Callable[[Tensor, Tensor], Tensor]


class TokenizerStage:
    """Two players and two optimizers, in turn.

    Args:
        perceptual: distances ``[B]`` of ``drawn, real [B, 3, H, W]`` in [-1, 1]; None leaves the
            term out.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: VisionTokenizer,
        stream: Stream,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.recipe, self.stream, self.perceptual = recipe, stream, perceptual
        o = recipe.objective
        self.tokenizer = tokenizer.train()
        self.discriminator = PatchDiscriminator(o.discriminator_channels, o.discriminator_layers)
        self.average = AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(o.average))
        self.tokenizer.compute_dtype = torch.bfloat16 if o.bfloat16 else None
        speed_up_bfloat16(self.tokenizer)
        self.usage = CodeUsage(tokenizer.settings.num_codes)
        self.modules = {
            "model": self.tokenizer,
            "discriminator": self.discriminator,
            "average": self.average,
            "usage": self.usage,
        }
        self.optimizer = build_optimizer(self.tokenizer, recipe.optim)
        self.discriminator_optimizer = build_optimizer(self.discriminator, recipe.optim)
        self.optimizers = {
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def step(self, step: int, pictures: Tensor, clips: Tensor) -> Figures:
        optim, o = self.recipe.optim, self.recipe.objective
        lr = learning_rate(step, self.recipe.train.steps, optim)
        watched = o.adversarial_weight > 0 and step >= o.adversarial_start
        real, drawn, codes, commitment = self._reconstruct(pictures, clips)
        terms = {"error": F.mse_loss(drawn, real), "commitment": commitment}
        weights = {"error": 1.0, "commitment": self.tokenizer.settings.commitment}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(drawn, real).mean()
            weights["perceptual"] = o.perceptual_weight
        if watched:
            terms["adversarial"] = generator_loss(self.discriminator(drawn))
            weights["adversarial"] = o.adversarial_weight
        loss = sum(weights[name] * term for name, term in terms.items())
        norm = take_step(self.tokenizer, self.optimizer, loss, lr, optim)
        figures = {name: term.detach() for name, term in terms.items()}
        if watched:
            figures["discriminator"] = self._teach(real, drawn.detach(), lr)
        self.average.update_parameters(self.tokenizer)
        figures |= self.usage.update(codes)
        return {"loss": loss.detach(), "lr": lr, "grad_norm": norm, **figures}

    def save(self, path: Path) -> None:
        save_vision(path, self.average.module)

    def _reconstruct(self, *batches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames ``[N, 3, S, S]``, their reconstructions, all codes, and the commitment.

        Pictures and clips are rounded together, so that the codebook moves once.
        """
        batches = [pixels for pixels in batches if len(pixels)]
        stills = [pixels.ndim == 4 for pixels in batches]
        clips = [p[:, None] if still else p for p, still in zip(batches, stills, strict=True)]
        latents = [self.tokenizer.latents(clip).movedim(1, -1) for clip in clips]
        rows = torch.cat([latent.flatten(0, -2) for latent in latents])
        quantized, codes, commitment = self.tokenizer.quantize(rows)
        drawn = []
        sizes = [latent.shape[:-1].numel() for latent in latents]
        for part, latent, still in zip(quantized.split(sizes), latents, stills, strict=True):
            vectors = part.view(latent.shape).movedim(-1, 1)
            drawn.append(self.tokenizer.pixels(vectors, still=still).flatten(0, 1))
        return (
            torch.cat([clip.flatten(0, 1) for clip in clips]),
            torch.cat(drawn),
            codes,
            commitment,
        )

    def _teach(self, real: Tensor, drawn: Tensor, lr: float) -> Tensor:
        loss = discriminator_loss(self.discriminator(real), self.discriminator(drawn))
        take_step(self.discriminator, self.discriminator_optimizer, loss, lr, self.recipe.optim)
        return loss.detach()
