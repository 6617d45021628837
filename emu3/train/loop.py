"""The loop of every stage: data, loss, step, log, save."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from emu3.config import Recipe
from emu3.train import checkpoint
from emu3.train.metrics import Metrics
from emu3.train.stage import Stage


def train(
    recipe: Recipe, folder: Path, build: Callable[[Any], Stage], *, resume: bool = False
) -> Path:
    """Run ``recipe`` in ``folder``; return the file of the trained weights.

    The run continues from ``folder/checkpoint.safetensors`` if ``resume`` is set and the file
    exists, as if it had never stopped.

    Args:
        build: makes the stage: the model and its starting weights, the loss and the data.
    """
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not resume:
        raise ValueError(f"train: {folder} already holds a run; resume it, or name another folder")
    torch.manual_seed(recipe.train.seed)
    stage = build(recipe)
    done = checkpoint.restore(saved, recipe, stage) if saved.exists() else 0
    steps = recipe.train.steps
    with closing(Metrics(folder, done)) as log, _progress() as progress:
        task = progress.add_task(recipe.train.stage, total=steps, completed=done, loss=math.nan)
        for step in range(done, steps):
            started = time.perf_counter()
            metrics = stage.step(step, *stage.stream.next_batch())
            if step % recipe.train.log_every == 0:
                log.log(step, metrics, seconds=time.perf_counter() - started)
            if (step + 1) % recipe.train.save_every == 0 or step + 1 == steps:
                log.flush()
                checkpoint.save(saved, step + 1, recipe, stage)
            progress.update(task, advance=1, loss=float(metrics["loss"]))
    weights = folder / f"{recipe.train.stage}.safetensors"
    stage.save(weights)
    return weights


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
