"""The loop of every stage: data, loss, step, log, save."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn

from emu3.config import Recipe
from emu3.data.stream import DigitStream, DocumentStream, PictureStream, digits_to_learn
from emu3.model import Emu3, seed_visual_rows
from emu3.text import ByteTokenizer
from emu3.train import checkpoint, objective
from emu3.train.metrics import Metrics
from emu3.train.optim import build_optimizer, learning_rate, take_step
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_decoder, save_vision


@dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage."""

    model: nn.Module
    stream: DigitStream
    loss: Callable
    save: Callable[[Path, nn.Module], None]


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> Path:
    """Run ``recipe`` in ``folder``; return the file of the trained weights.

    The run continues from ``folder/checkpoint.safetensors`` if ``resume`` is set and the file
    is there, as if it had never stopped.
    """
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not resume:
        raise ValueError(f"train: {folder} already holds a run; resume it, or name another folder")
    torch.manual_seed(recipe.train.seed)
    stage = _vision_stage(recipe) if recipe.train.stage == "vision" else _decoder_stage(recipe)
    optimizer = build_optimizer(stage.model, recipe.optim)
    state = recipe, stage.model, optimizer, stage.stream
    done = checkpoint.restore(saved, *state) if saved.exists() else 0
    steps = recipe.train.steps
    with closing(Metrics(folder, done)) as metrics, _progress() as progress:
        task = progress.add_task(recipe.train.stage, total=steps, completed=done, loss=math.nan)
        for step in range(done, steps):
            started = time.perf_counter()
            batch = stage.stream.next_batch()
            loss, figures = stage.loss(stage.model, *batch)
            lr = learning_rate(step, steps, recipe.optim)
            norm = take_step(stage.model, optimizer, loss, lr, recipe.optim)
            if step % recipe.train.log_every == 0:
                figures = {"loss": loss.detach(), "lr": lr, "grad_norm": norm, **figures}
                metrics.log(step, figures, seconds=time.perf_counter() - started)
            if (step + 1) % recipe.train.save_every == 0 or step + 1 == steps:
                metrics.flush()
                checkpoint.save(saved, step + 1, *state)
            progress.update(task, advance=1, loss=float(loss.detach()))
    weights = folder / f"{recipe.train.stage}.safetensors"
    stage.save(weights, stage.model)
    return weights


def _vision_stage(recipe: Recipe) -> Stage:
    digits = digits_to_learn(recipe.data)
    size = recipe.vision.image_size
    stream = PictureStream(digits, recipe.data, size, recipe.train.seed)
    return Stage(VisionTokenizer(recipe.vision), stream, objective.reconstruction, save_vision)


def _decoder_stage(recipe: Recipe) -> Stage:
    if recipe.data.tokenizer is None:
        raise ValueError("train: data.tokenizer must name a trained vision tokenizer")
    tokenizer = load_vision(recipe.data.tokenizer)
    if tokenizer.settings.num_codes != recipe.model.vocabulary.num_visual:
        raise ValueError(
            f"train: {recipe.data.tokenizer} has {tokenizer.settings.num_codes} codes, the "
            f"model's vocabulary {recipe.model.vocabulary.num_visual}"
        )
    text = ByteTokenizer(recipe.model.vocabulary)
    stream = DocumentStream(digits_to_learn(recipe.data), recipe, tokenizer, text)
    model = Emu3(recipe.model)
    seed_visual_rows(model, tokenizer.codebook)
    return Stage(model, stream, objective.next_token, save_decoder)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
