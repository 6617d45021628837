"""Runs of seconds of the stage that reads preference pairs."""

from dataclasses import replace
from pathlib import Path

import torch

from emu3.config import BYTE_VOCABULARY
from emu3.data.pairs import Pairs, PairsHeader, save_pairs, weights_fingerprint
from emu3.model import Emu3
from emu3.prompt import generation_prompt
from emu3.tasks import load_recipe
from emu3.text import ByteTokenizer
from emu3.train.preference_recipe import PreferenceRecipe
from emu3.train.reference import reference_of
from emu3.weights import load_decoder, save_decoder

GRID = 3, 4
TOML = """
preset = "mini"

[train]
stage = "dpo"
steps = 6
save_every = 2
start = "{folder}/start.safetensors"

[model]
hidden_size = 32
num_layers = 1
num_heads = 4
num_kv_heads = 4
head_dim = 8
intermediate_size = 48
init_std = 0.1

[data]
pairs = "{folder}/pairs"
context = 144
batch_size = 4

[evaluation]
pairs = "{folder}/validation.safetensors"
every = 3
rows = 4

[optim]
lr = 3e-3
warmup_steps = 2
"""


def make_pairs(count: int, seed: int = 0, grid: tuple[int, int] = GRID) -> Pairs:
    """Draw pairs of random codes without a reference, with prompts of 1 to 19 letters."""
    random = torch.Generator().manual_seed(seed)
    text = ByteTokenizer(BYTE_VOCABULARY)
    prompts = ["a red seven and more"[: 1 + number % 19] for number in range(count)]
    codes = torch.randint(512, (2, count, *grid), generator=random).short()
    votes = torch.tensor([[[1.0], [0.0]]]).expand(count, 2, 1)
    return Pairs(
        PairsHeader(vocabulary=BYTE_VOCABULARY, vision="0" * 16, voters=("human",)),
        prompts,
        [torch.tensor(generation_prompt(p, grid, text), dtype=torch.int32) for p in prompts],
        *codes,
        votes,
        votes.sum(2),
    )


def with_reference(pairs: Pairs, start: Path) -> Pairs:
    header = pairs.header.model_copy(update={"decoder": weights_fingerprint(start)})
    reference = reference_of(load_decoder(start), pairs)
    return replace(pairs, header=header, reference=reference)


def write_data(folder: Path) -> None:
    """Write weights to start from, pairs of two grids to train on, others, and the recipe."""
    (folder / "recipe.toml").write_text(TOML.format(folder=folder))
    recipe, start = tiny(folder), folder / "start.safetensors"
    torch.manual_seed(0)
    save_decoder(start, Emu3(recipe.model))
    for name, count, grid in (("pairs/dpo-3x4", 20, GRID), ("pairs/dpo-2x5", 7, (2, 5))):
        pairs = with_reference(make_pairs(count, count, grid), start)
        save_pairs(folder / f"{name}.safetensors", pairs)
    held = with_reference(make_pairs(8, 1), start)
    save_pairs(folder / "validation.safetensors", held)


def tiny(folder: Path, *words: str) -> PreferenceRecipe:
    return load_recipe(folder / "recipe.toml", words)
