"""Runs of seconds of the stage that reads token stores."""

from pathlib import Path

from emu3.tasks import load_recipe
from emu3.train.store_recipe import StoreRecipe
from tests.train.stores import mixed_documents, write_store

TOML = """
preset = "mini"

[train]
stage = "pretrain"
steps = 6
save_every = 2

[model]
hidden_size = 32
num_layers = 1
num_heads = 4
num_kv_heads = 4
head_dim = 8
intermediate_size = 48
dropout = 0.1

[data]
context = 96
batch_size = 4
smallest_piece = 16
window = 64
sources = [{{store = "{folder}/store"}}]

[evaluation]
sources = [{{store = "{folder}/validation"}}]
every = 3
rows = 4

[optim]
lr = 3e-3
warmup_steps = 2
"""


def write_data(folder: Path) -> None:
    """Write a store to train on, one to evaluate on, and the recipe."""
    write_store(folder / "store", mixed_documents(120), 2)
    write_store(folder / "validation", mixed_documents(30, 1000))
    (folder / "recipe.toml").write_text(TOML.format(folder=folder))


def tiny(folder: Path, *words: str) -> StoreRecipe:
    return load_recipe(folder / "recipe.toml", words)
