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
from emu3.train.lock import locked
from emu3.train.metrics import Metrics
from emu3.train.stage import Stage, StepMetrics


def train(
    recipe: Recipe, folder: Path, build: Callable[[Any], Stage], *, resume: bool = False
) -> Path:
    """Run ``recipe`` in ``folder``; return the file of the trained weights.

    With ``resume`` the run in ``folder`` continues as if it had never stopped.

    Args:
        build: makes the stage: the model and its starting weights, the loss and the data.

    Raises:
        ValueError: one line, if the folder holds a run and ``resume`` is not set, or none and it
            is; if another process is training there; or if a metric or a weight is not finite,
            which ends the run and leaves its last checkpoint.
    """
    saved = folder / checkpoint.FILE
    _check(saved, resume)
    torch.manual_seed(recipe.train.seed)
    stage = build(recipe)
    with locked(folder):
        _check(saved, resume)  # a run may have ended here meanwhile
        done = checkpoint.restore(saved, recipe, stage) if resume else 0
        _run(recipe, saved, stage, done)
        weights = folder / f"{recipe.train.stage}.safetensors"
        stage.save(weights)
    return weights


def _check(saved: Path, resume: bool) -> None:
    if resume and not saved.exists():
        raise ValueError(f"train: no run in {saved.parent} to resume: it has no {saved.name}")
    if saved.exists() and not resume:
        raise ValueError(
            f"train: {saved.parent} already holds a run; resume it, or name another folder"
        )


def _run(recipe: Recipe, saved: Path, stage: Stage, done: int) -> None:
    settings, steps = recipe.train, recipe.train.steps
    with closing(Metrics(saved.parent, done)) as log, _progress() as progress:
        state = "already finished" if done == steps else ""
        task = progress.add_task(settings.stage, total=steps, completed=done, state=state)
        for step in range(done, steps):
            started = time.perf_counter()
            metrics = _finite(step, stage.step(step, *stage.stream.next_batch()))
            if step % settings.log_every == 0:
                log.log(step, metrics, seconds=time.perf_counter() - started)
            if (step + 1) % settings.save_every == 0 or step + 1 == steps:
                log.flush()
                checkpoint.save(saved, step + 1, recipe, stage)
            progress.update(task, advance=1, state=f"loss {metrics['loss']:.4f}")


def _finite(step: int, metrics: StepMetrics) -> dict[str, float]:
    """The metrics as numbers. Weights are checked when they are saved."""
    numbers = {name: float(value) for name, value in metrics.items()}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"train: step {step}: {name} must be finite, got {value}")
    return numbers


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
