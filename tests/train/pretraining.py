"""Runs of seconds of the stage that reads token stores."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from emu3.tasks import load_recipe
from emu3.train import pretrain
from emu3.train.pretrain_loop import pretrain as train
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


class Killed(Exception):
    """Ends a run where a kill would."""


def before_step(monkeypatch, number: int, act: Callable[[pretrain.Pretraining], None]) -> None:
    """Call ``act`` before a step is made."""
    step = pretrain.Pretraining.step

    def counted(self, now, batches):
        if now == number:
            act(self)
        return step(self, now, batches)

    monkeypatch.setattr(pretrain.Pretraining, "step", counted)


def killed(_run) -> None:
    raise Killed


def assert_same_run(run: Path, whole: Path) -> None:
    names = "metrics.jsonl", "pretrain.safetensors"
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def poisoned(monkeypatch, steps: set[int]) -> None:
    """Make the gradient of the embedding NaN in some steps."""
    clip, count = pretrain.clip_gradients, iter(range(1000))

    def clipped(model, layout, most):
        if next(count) in steps:
            model.embedding.weight.grad.to_local().fill_(math.nan)
        return clip(model, layout, most)

    monkeypatch.setattr(pretrain, "clip_gradients", clipped)


def on_rank(_group, folder: str, out: str, words: list[str], resume: bool) -> None:
    train(tiny(Path(folder), *words), Path(out), resume=resume)


def stopped_after(_group, folder: str, out: str, words: list[str], steps: int) -> None:
    """Train until a step is saved, and end there on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, steps, killed)
        with pytest.raises(Killed):
            train(tiny(Path(folder), *words), Path(out))
