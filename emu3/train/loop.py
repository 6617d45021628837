"""The loop of every stage: data, loss, step, log, save."""

import math
import time
from collections.abc import Callable, Sequence
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
from emu3.train.metrics import Metrics, are_on_gpu, numbers_of
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
    with closing(Metrics(saved.parent, done)) as log, progress_bar() as progress:
        state = "already finished" if done == steps else ""
        task = progress.add_task(settings.stage, total=steps, completed=done, state=state)
        unread, started = [], time.perf_counter()
        for step in range(done, steps):
            unread.append(stage.step(step, *stage.stream.next_batch()))
            logs = step % settings.log_every == 0
            saves = (step + 1) % settings.save_every == 0 or step + 1 == steps
            # Every read waits for the GPU, which is to have its next steps queued.
            if are_on_gpu(unread[-1]) and not (logs or saves):
                continue
            metrics = _finite(step, unread)
            if logs:
                seconds = (time.perf_counter() - started) / len(unread)
                log.log(step, metrics, seconds=seconds)
            if saves:
                log.flush()
                checkpoint.save(saved, step + 1, recipe, stage)
            progress.update(task, advance=len(unread), state=f"loss {metrics['loss']:.4f}")
            unread, started = [], time.perf_counter()


def _finite(step: int, metrics: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the metrics of ``step``, the last of ``metrics``; all must be finite.

    Weights are checked when they are saved.
    """
    of_steps = numbers_of(metrics)
    for number, numbers in enumerate(of_steps, step + 1 - len(of_steps)):
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"train: step {number}: {name} must be finite, got {value}")
    return of_steps[-1]


def progress_bar(*, visible: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        disable=not visible,
    )
