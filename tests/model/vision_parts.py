"""Vision tokenizers with random weights that use many codes, and images for them."""

import torch
from torch import Tensor

from emu3.config import VisionSettings
from emu3.vision import VisionTokenizer

SMALL = VisionSettings(base_channels=32, num_codes=512)
"""Every part of Emu3's tokenizer at an eighth of its width."""

FACTORS = (
    *(f"{norm}.weight" for norm in ("norm", "norm1", "norm2", "norm_out", "norm_layer")),
    *("conv_y.bias", "running_var"),
)
"""Factors are sampled around 1; the rest of the norms around 0."""


def images(*shape: int, seed: int = 0) -> Tensor:
    """Noise on a slope, in [-1, 1], so that neither places nor frames look alike."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(*shape, generator=random) * 2 - 1
    slope = torch.linspace(-1, 1, shape[-1])
    return (noise + slope) / 2


@torch.no_grad()
def random_tokenizer(
    settings: VisionSettings = SMALL, seed: int = 0, num_images: int = 4
) -> VisionTokenizer:
    """Draw norms and batch statistics too; spread the codebook as latents of images are spread."""
    torch.manual_seed(seed)
    tokenizer = VisionTokenizer(settings).eval()
    for name, value in tokenizer.state_dict().items():
        if "norm" in name and value.is_floating_point():
            centre = 1.0 if name.endswith(FACTORS) else 0.0
            value.copy_(centre + 0.2 * torch.randn_like(value).clamp(-2, 2))
    spread_codebook(tokenizer, num_images)
    return tokenizer


@torch.no_grad()
def spread_codebook(tokenizer: VisionTokenizer, num_images: int = 4) -> None:
    rows = tokenizer.latents(images(num_images, 1, 3, 64, 64)).movedim(1, -1).flatten(0, -2)
    codebook = tokenizer.quantize.embedding.weight
    codebook.copy_(rows.mean(0) + rows.std(0) * torch.randn_like(codebook))
