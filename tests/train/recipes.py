"""Runs of seconds: recipes that ship, cut down to the smallest shapes."""

from pathlib import Path

import torch

from emu3.config import Recipe, load_recipe
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision

VISION_WORDS = [
    "train.steps=9",
    "train.save_every=2",
    "data.batch_size=6",
    "vision.image_size=16",
    "vision.base_channels=8",
    "vision.multipliers=[1, 1, 1]",
    "vision.attention_stages=[2]",
    "vision.revive_below=0.9",  # many codes starve, so that the random numbers matter
    "optim.warmup_steps=2",
]
DECODER_WORDS = [
    "train.steps=9",
    "train.save_every=2",
    "data.batch_size=6",
    "model.width=32",
    "model.layers=1",
    "model.ff_width=48",
    "model.dropout=0.2",  # dropout draws from the random numbers that a checkpoint must hold
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


def tiny_recipe(stage: str, folder: Path) -> Recipe:
    if stage == "vision":
        return load_recipe("vision", vision_words())
    return load_recipe("digits", decoder_words(folder))
