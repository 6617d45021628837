"""A run that is killed and resumed leaves what the unbroken run leaves, to the byte."""

import json
import math
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from emu3 import files
from emu3.config import Recipe
from emu3.tasks import train
from emu3.train import checkpoint
from emu3.train.metrics import Metrics
from emu3.weights import read_tensors, save_tensors
from emu3.weights.files import FORMER_NAMES
from tests import children
from tests.train.recipes import tiny_recipe


def continued(recipe: Recipe, folder: Path) -> Path:
    """Resume the run in ``folder``, or start it if it was killed before its first checkpoint."""
    return train(recipe, folder, resume=(folder / checkpoint.FILE).exists())


def train_until_killed(stage: str, folder: Path, where: str, count: int) -> None:
    """End this process by SIGKILL: at a step, or inside a save.

    There the new file is written and the old one still in place. SIGKILL cannot be caught, so
    nothing is cleaned up.
    """
    module, name = (Metrics, "log") if where == "step" else (files, "flush")
    real, calls = getattr(module, name), 0

    def count_down(*args, **named):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    setattr(module, name, count_down)
    continued(tiny_recipe(stage, folder), folder / "killed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A recipe of one step, and the tensors and metadata of its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = tiny_recipe("vision", folder)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1})})
    train(recipe, folder)
    return recipe, *read_tensors(folder / "checkpoint.safetensors")


@pytest.mark.parametrize(
    "stage",
    ["decoder", *(pytest.param(s, marks=pytest.mark.e2e) for s in ("vision", "tokenizer"))],
)
def test_a_killed_run_resumes_to_the_same_bytes(stage, tmp_path):
    """Killed at a random step past the first checkpoint, then inside a save, then left alone."""
    recipe = tiny_recipe(stage, tmp_path)
    unbroken = train(recipe, tmp_path / "unbroken")
    step = random.Random(stage).randint(recipe.train.save_every + 2, recipe.train.steps - 1)
    killed = partial(children.exit_code, train_until_killed, stage, tmp_path)
    assert killed("step", step) == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.safetensors").exists()
    assert killed("save", 3) == -signal.SIGKILL
    resumed = train(recipe, tmp_path / "killed", resume=True)
    curves = [tmp_path / run / "metrics.jsonl" for run in ("unbroken", "killed")]
    assert curves[0].read_bytes() == curves[1].read_bytes()
    assert len(curves[0].read_text().splitlines()) == recipe.train.steps
    assert resumed.read_bytes() == unbroken.read_bytes()
    left = {path.name for path in (tmp_path / "killed").iterdir() if path.is_file()}
    assert left == {".lock", "checkpoint.safetensors", "metrics.jsonl", f"{stage}.safetensors"}


@pytest.mark.parametrize(
    "stage",
    ["decoder", *(pytest.param(s, marks=pytest.mark.e2e) for s in ("vision", "tokenizer"))],
)
def test_a_checkpoint_of_an_older_version_is_resumed(stage, tmp_path):
    """Its recipe has the former names of settings, and tables that its stage no longer has."""
    recipe = tiny_recipe(stage, tmp_path)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})})
    first = train(recipe, tmp_path / "run").read_bytes()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    tables = json.loads(metadata["recipe"])
    for table, names in FORMER_NAMES.items():
        for old, new in names.items() if table in tables else ():
            tables[table][old] = tables[table].pop(new)
    tables.setdefault("data", {"held_out": 0.25})
    tensors = {name.replace(".cluster_size", ".members"): v for name, v in tensors.items()}
    save_tensors(path, tensors, metadata | {"recipe": json.dumps(tables)})
    assert train(recipe, tmp_path / "run", resume=True).read_bytes() == first


def test_a_finished_run_resumes_to_itself_and_says_so(tmp_path, capsys):
    """It showed "loss nan"."""
    recipe = tiny_recipe("vision", tmp_path)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"steps": 4, "save_every": 2})}
    )
    first = train(recipe, tmp_path / "run").read_bytes()
    shown = capsys.readouterr().out
    assert "loss 0." in shown
    assert "nan" not in shown
    assert train(recipe, tmp_path / "run", resume=True).read_bytes() == first
    shown = capsys.readouterr().out
    assert "4/4" in shown
    assert "already finished" in shown
    assert "nan" not in shown


def test_resuming_where_no_run_is_is_refused_and_leaves_nothing(tmp_path):
    """A mistyped folder started a run anew, from step 0."""
    with pytest.raises(ValueError, match=r"^train: no run in .*nowhere to resume: it has no check"):
        train(tiny_recipe("vision", tmp_path), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    recipe = tiny_recipe("vision", tmp_path)
    train(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; resume it, or name another"):
        train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_another_recipe_does_not_resume_and_says_what_differs(tmp_path):
    recipe = tiny_recipe("vision", tmp_path)
    train(recipe, tmp_path / "run")
    before, _ = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    other = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(ValueError, match=r"another recipe: optim.lr was 0.002, is 0.5"):
        train(other, tmp_path / "run", resume=True)
    after, _ = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize(
    "lost",
    [
        "step",
        "random",
        "stream.rest",
        "stream.generator",
        "optimizer.0.step",
        "optimizer.0.exp_avg",
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(lost, saved, tmp_path):
    """A part that was missing came out as a KeyError, or as one of the optimizer's next step."""
    recipe, tensors, metadata = saved
    tensors, metadata = ({n: v for n, v in d.items() if n != lost} for d in (tensors, metadata))
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=rf"checkpoint.safetensors is .*lacks.*{lost}"):
        train(recipe, tmp_path, resume=True)


def test_moments_of_no_parameter_or_another_shape_are_refused(saved, tmp_path):
    (recipe, tensors, metadata), path = saved, tmp_path / "checkpoint.safetensors"
    save_tensors(path, {**tensors, "optimizer.9999.step": torch.tensor(1.0)}, metadata)
    with pytest.raises(ValueError, match=r"optimizer.9999.step has no place here"):
        train(recipe, tmp_path, resume=True)
    save_tensors(path, {**tensors, "optimizer.0.exp_avg": torch.zeros(3)}, metadata)
    with pytest.raises(ValueError, match=r"optimizer.0.exp_avg is \(3,\), expected"):
        train(recipe, tmp_path, resume=True)


def test_a_checkpoint_that_is_not_finite_is_refused(saved, tmp_path):
    """A run that had diverged was resumed, and went on in NaN."""
    (recipe, tensors, metadata), path = saved, tmp_path / "checkpoint.safetensors"
    for name, bad in (
        ("model.decoder.conv_out.bias", math.nan),
        ("optimizer.0.exp_avg", -math.inf),
    ):
        broken = tensors[name].clone()
        broken.flatten()[-1] = bad
        save_tensors(path, {**tensors, name: broken}, metadata)
        with pytest.raises(ValueError, match=rf"^resume: .*checkpoint.safetensors: {name} must be"):
            train(recipe, tmp_path, resume=True)


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "[1]", '{"step": 0', '{"step": null}'])
def test_a_curve_with_a_line_of_no_step_is_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0, "loss": 1.0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"^metrics: line 2 of .*metrics.jsonl must hold a step"):
        Metrics(tmp_path, 1)
