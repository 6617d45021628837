"""A picture encoded and decoded beside Hugging Face's Emu3VQVAE: same weights, same precision."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import clock
from benchmarks.contestants import Lineup
from emu3.config import VisionSettings
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision

OURS, THEIRS = "emu3.VisionTokenizer", "Hugging Face"
DIRECTION = "encode+decode"
PICTURE = 256
SAME_CODES = 0.999
"""Share of the codes that must agree in float32; neighbours may tie within rounding."""

Redraw = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The codes and the pixels of ``[1, 3, H, W]``."""


def hugging_face(settings: VisionSettings) -> nn.Module:
    """Draw theirs, with a codebook as wide as the latents, so that many codes are in use."""
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
        rows = load_vision(model.state_dict()).latents(picture(64)[:, None]).movedim(1, -1)
        spread, centre = rows.flatten(0, -2).std(0), rows.flatten(0, -2).mean(0)
        codebook = model.quantize.embedding.weight
        codebook.copy_(centre + spread * torch.randn_like(codebook))
    return model


def picture(side: int) -> Tensor:
    """Draw noise on a slope, ``[1, 3, side, side]``."""
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


def lineup(settings: VisionSettings, side: int, dtype: torch.dtype, device: str = "cpu") -> Lineup:
    """Bring both to the second call, theirs checked against ours.

    In float32 by its codes and pixels; in bfloat16 roundings add up to other codes, and both draw
    from ours.
    """
    model = hugging_face(settings)
    tokenizer = load_vision(model.state_dict())
    entrants: dict[str, Redraw] = {
        OURS: partial(ours, tokenizer.to(device, dtype)),
        THEIRS: partial(theirs, model.to(device, dtype)),
    }
    pixels = picture(side).to(device, dtype)
    entered = Lineup(clock=clock.of(device))
    drawn = {
        name: entered.enter(name, partial(redraw, pixels)) for name, redraw in entrants.items()
    }
    entered.results_mib = sum(result.nbytes for result in drawn[OURS]) / 2**20
    agreement = (drawn[OURS][0] == drawn[THEIRS][0]).double().mean().item()
    if dtype == torch.float32 and agreement < SAME_CODES:
        entered.drop(THEIRS, f"{agreement:.1%} of its codes are ours")
    entered.estimate()
    return entered
