"""An image encoded and decoded beside Hugging Face's Emu3VQVAE: same weights, same precision."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import clock
from benchmarks.harness.entries import Entries
from emu3.config import VisionSettings
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision

OURS, THEIRS = "emu3.VisionTokenizer", "Hugging Face"
DIRECTION = "encode+decode"
SIDE = 256
WARM = 4
"""The image that warms up is so many times smaller in height and width."""
SAME_CODES = 0.95
"""Share of the codes that must agree in float32: a few tie within rounding, while two different
models agree on hardly any."""

RoundTrip = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Codes and reconstruction of an image ``[1, 3, H, W]``."""


def hugging_face(settings: VisionSettings) -> nn.Module:
    """Build theirs at random, with a codebook spread like the latents, so that many codes occur."""
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE, Emu3VQVAEConfig

    config = Emu3VQVAEConfig(
        codebook_size=settings.num_codes,
        embed_dim=settings.code_width,
        latent_channels=settings.code_width,
        base_channels=settings.base_channels,
        channel_multiplier=list(settings.multipliers),
        num_res_blocks=settings.num_res_blocks,
        attn_resolutions=list(settings.attention_stages),
        hidden_size=settings.widths[-1],
        temporal_downsample_factor=settings.temporal_factor,
    )
    torch.manual_seed(0)
    model = Emu3VQVAE(config)
    with torch.no_grad():
        rows = load_vision(model.state_dict()).latents(noise_image(64)[:, None]).movedim(1, -1)
        spread, centre = rows.flatten(0, -2).std(0), rows.flatten(0, -2).mean(0)
        codebook = model.quantize.embedding.weight
        codebook.copy_(centre + spread * torch.randn_like(codebook))
    return model


def noise_image(side: int) -> Tensor:
    """Return noise on a slope, ``[1, 3, side, side]``."""
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (noise + torch.linspace(-1, 1, side)) / 2


@torch.no_grad()
def ours(tokenizer: VisionTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    codes = tokenizer.encode(pixels)
    return codes, tokenizer.decode(codes)


@torch.no_grad()
def theirs(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
    codes = torch.stack(model.encode(pixels, image_sizes=sizes).image_tokens)
    return codes, model.decode(codes)


def agreement(made: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the share of codes that are equal."""
    return (made[OURS][0] == made[THEIRS][0]).double().mean().item()


def entries_of(
    settings: VisionSettings, side: int, dtype: torch.dtype, device: str = "cpu"
) -> Entries:
    """Warm both up on a smaller image, and compare their codes on it.

    In float32 alone: in bfloat16 rounding leads to other codes.
    """
    model = hugging_face(settings)
    tokenizer = load_vision(model.state_dict())
    tokenizers: dict[str, RoundTrip] = {
        OURS: partial(ours, tokenizer.to(device, dtype)),
        THEIRS: partial(theirs, model.to(device, dtype)),
    }
    whole, small = (noise_image(side // n).to(device, dtype) for n in (1, WARM))
    entries = Entries(clock=clock.of(device))
    made = {
        name: entries.add_warm(name, partial(run, whole), partial(run, small), WARM**2)
        for name, run in tokenizers.items()
    }
    entries.results_mib = WARM**2 * sum(result.nbytes for result in made[OURS]) / 2**20
    if dtype == torch.float32 and agreement(made) < SAME_CODES:
        entries.drop(THEIRS, f"{agreement(made):.1%} of its codes are ours")
    entries.estimate()
    return entries
