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
WARM = 4
"""Times smaller, in height and width, is the picture that is drawn before the rounds."""
SAME_CODES = 0.95
"""Share of the codes that must agree in float32: a few tie within rounding, and of another model's
hardly one is the same."""

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


def agreement(drawn: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the share of codes that both gave."""
    return (drawn[OURS][0] == drawn[THEIRS][0]).double().mean().item()


def lineup(settings: VisionSettings, side: int, dtype: torch.dtype, device: str = "cpu") -> Lineup:
    """Warm both up on a smaller picture, where theirs is checked against ours by its codes.

    In float32 alone: in bfloat16 roundings add up to other codes.
    """
    model = hugging_face(settings)
    tokenizer = load_vision(model.state_dict())
    entrants: dict[str, Redraw] = {
        OURS: partial(ours, tokenizer.to(device, dtype)),
        THEIRS: partial(theirs, model.to(device, dtype)),
    }
    whole, part = (picture(side // n).to(device, dtype) for n in (1, WARM))
    entered = Lineup(clock=clock.of(device))
    drawn = {
        name: entered.enter_by_part(name, partial(redraw, whole), partial(redraw, part), WARM**2)
        for name, redraw in entrants.items()
    }
    entered.results_mib = WARM**2 * sum(result.nbytes for result in drawn[OURS]) / 2**20
    if dtype == torch.float32 and agreement(drawn) < SAME_CODES:
        entered.drop(THEIRS, f"{agreement(drawn):.1%} of its codes are ours")
    entered.estimate()
    return entered
