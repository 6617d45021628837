"""Training of Emu3's vision tokenizer on images and clips.

``loss = mean (reconstructed - real)^2 + a * perceptual + b * adversarial + c * commitment``, the
terms of Emu3 (arXiv 2409.18869, section 2.2) with the weights of MoVQGAN, from which it starts. A
PatchGAN is trained as the discriminator. A run saves a running mean of the tokenizer's weights.
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
from emu3.train.perceptual import load_lpips
from emu3.train.stage import StepMetrics, Stream
from emu3.train.start import begin
from emu3.train.usage import CodeUsage
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision
from emu3_kernels.modules import speed_up_bfloat16

Perceptual = Callable[[Tensor, Tensor], Tensor]


def tokenizer_stage(recipe: Recipe) -> "TokenizerStage":
    """The stage of a recipe, on crops of its files."""
    # Imported here: PyAV is slow to import and no other stage needs it.
    from emu3.data.crops import CropStream, load_split

    train_set, _ = load_split(recipe.media)
    stream = CropStream(train_set, recipe.media, recipe.train.seed)
    perceptual = load_lpips(recipe.objective.lpips) if recipe.objective.lpips else None
    return TokenizerStage(recipe, begin(recipe), stream, perceptual)


class TokenizerStage:
    """Generator and discriminator, each with its optimizer, in turn.

    Args:
        perceptual: distances ``[B]`` of ``reconstructed, real [B, 3, H, W]`` in [-1, 1]; None
            leaves the term out.
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

    def step(self, step: int, images: Tensor, clips: Tensor) -> StepMetrics:
        optim, o = self.recipe.optim, self.recipe.objective
        lr = learning_rate(step, self.recipe.train.steps, optim)
        adversarial = o.adversarial_weight > 0 and step >= o.adversarial_start
        real, reconstructed, codes, commitment = self._reconstruct(images, clips)
        terms = {"error": F.mse_loss(reconstructed, real), "commitment": commitment}
        weights = {"error": 1.0, "commitment": self.tokenizer.settings.commitment}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstructed, real).mean()
            weights["perceptual"] = o.perceptual_weight
        if adversarial:
            terms["adversarial"] = generator_loss(self.discriminator(reconstructed))
            weights["adversarial"] = o.adversarial_weight
        loss = sum(weights[name] * term for name, term in terms.items())
        norm = take_step(self.tokenizer, self.optimizer, loss, lr, optim)
        metrics = {name: term.detach() for name, term in terms.items()}
        if adversarial:
            metrics["discriminator"] = self._train_discriminator(real, reconstructed.detach(), lr)
        self.average.update_parameters(self.tokenizer)
        metrics |= self.usage.update(codes)
        return {"loss": loss.detach(), "lr": lr, "grad_norm": norm, **metrics}

    def save(self, path: Path) -> None:
        save_vision(path, self.average.module)

    def _reconstruct(self, *batches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames ``[N, 3, S, S]``, their reconstructions, all codes, and the commitment.

        Images and clips are quantized together, so that the codebook is updated once.
        """
        batches = [pixels for pixels in batches if len(pixels)]
        are_images = [pixels.ndim == 4 for pixels in batches]
        clips = [
            p[:, None] if is_image else p for p, is_image in zip(batches, are_images, strict=True)
        ]
        latents = [self.tokenizer.latents(clip).movedim(1, -1) for clip in clips]
        rows = torch.cat([latent.flatten(0, -2) for latent in latents])
        quantized, codes, commitment = self.tokenizer.quantize(rows)
        reconstructed = []
        sizes = [latent.shape[:-1].numel() for latent in latents]
        for part, latent, is_image in zip(quantized.split(sizes), latents, are_images, strict=True):
            vectors = part.view(latent.shape).movedim(-1, 1)
            reconstructed.append(self.tokenizer.pixels(vectors, is_image=is_image).flatten(0, 1))
        return (
            torch.cat([clip.flatten(0, 1) for clip in clips]),
            torch.cat(reconstructed),
            codes,
            commitment,
        )

    def _train_discriminator(self, real: Tensor, reconstructed: Tensor, lr: float) -> Tensor:
        loss = discriminator_loss(self.discriminator(real), self.discriminator(reconstructed))
        take_step(self.discriminator, self.discriminator_optimizer, loss, lr, self.recipe.optim)
        return loss.detach()
