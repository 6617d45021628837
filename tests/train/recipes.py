"""Runs of seconds: recipes that ship, cut down to the smallest shapes."""

from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from emu3.config import Recipe
from emu3.data.media import write_image, write_video
from emu3.tasks import load_recipe
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision
from tests.train.clips import clip

VISION_WORDS = [
    "train.steps=9",
    "train.save_every=2",
    "data.batch_size=6",
    "vision.image_size=16",
    "vision.base_channels=8",
    "vision.multipliers=[1, 1, 1]",
    "vision.attention_stages=[2]",
    "vision.ema_decay=0.5",
    "vision.dead_code_threshold=0.9",  # many codes starve, so that the random numbers matter
    "optim.warmup_steps=2",
]
DECODER_WORDS = [
    "train.steps=9",
    "train.save_every=2",
    "data.batch_size=6",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.intermediate_size=48",
    "model.dropout=0.2",  # dropout draws from the random numbers that a checkpoint must hold
    "optim.warmup_steps=2",
]

TOKENIZER_WORDS = [
    "train.steps=9",
    "train.save_every=2",
    "vision.base_channels=4",
    "vision.multipliers=[1, 2]",
    "vision.attention_stages=[1]",
    "vision.groups=2",
    "vision.num_codes=24",
    "vision.dead_code_threshold=0.9",
    "media.crop=16",
    "media.images=3",
    "media.clips=2",
    "media.shrink=2",
    "media.validation=['unseen']",
    "media.validation_tail=0.5",
    "objective.adversarial_start=3",
    "objective.discriminator_channels=2",
    "optim.warmup_steps=2",
]


def vision_words() -> list[str]:
    return list(VISION_WORDS)


def decoder_words(folder: Path) -> list[str]:
    """Overrides for a decoder on an untrained tokenizer, which is written to ``folder``."""
    recipe = load_recipe("vision", VISION_WORDS)
    path = folder / "tokenizer.safetensors"
    torch.manual_seed(0)
    save_vision(path, VisionTokenizer(recipe.vision))
    return [*DECODER_WORDS, f'data.tokenizer="{path}"']


def tokenizer_words(folder: Path) -> list[str]:
    """Overrides for the tokenizer's stage on two images and a clip, written to ``folder``."""
    random = torch.Generator().manual_seed(0)
    for name in ("seen", "unseen"):
        rough = torch.rand(1, 3, 5, 6, generator=random) * 255
        smooth = F.interpolate(rough, (40, 48), mode="bicubic").clamp(0, 255)
        write_image(folder / f"{name}.png", smooth[0].byte())
    write_video(folder / "moving.mp4", clip(16, 32, 40), Fraction(25))
    files = [f"{folder}/{name}" for name in ("seen.png", "unseen.png", "moving.mp4")]
    return [*TOKENIZER_WORDS, f"media.sources={files}"]


def tiny_recipe(stage: str, folder: Path) -> Recipe:
    if stage == "vision":
        return load_recipe("vision", vision_words())
    if stage == "tokenizer":
        return load_recipe("tokenizer", tokenizer_words(folder))
    return load_recipe("digits", decoder_words(folder))
