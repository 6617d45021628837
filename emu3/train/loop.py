"""The loop of every stage: data, loss, step, log, save."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from emu3.config import Recipe
from emu3.data.stream import DocumentStream, PictureStream, digits_to_learn
from emu3.model import Emu3, seed_visual_rows
from emu3.text import ByteTokenizer
from emu3.train import checkpoint, objective
from emu3.train.metrics import Metrics
from emu3.train.perceptual import load_lpips
from emu3.train.stage import SingleLossStage, Stage
from emu3.train.start import begin
from emu3.train.tokenizer import TokenizerStage
from emu3.weights import load_vision, save_decoder, save_vision


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> Path:
    """Run ``recipe`` in ``folder``; return the file of the trained weights.

    The run continues from ``folder/checkpoint.safetensors`` if ``resume`` is set and the file
    is there, as if it had never stopped.
    """
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not resume:
        raise ValueError(f"train: {folder} already holds a run; resume it, or name another folder")
    torch.manual_seed(recipe.train.seed)
    stage = _STAGES[recipe.train.stage](recipe)
    done = checkpoint.restore(saved, recipe, stage) if saved.exists() else 0
    steps = recipe.train.steps
    with closing(Metrics(folder, done)) as metrics, _progress() as progress:
        task = progress.add_task(recipe.train.stage, total=steps, completed=done, loss=math.nan)
        for step in range(done, steps):
            started = time.perf_counter()
            figures = stage.step(step, *stage.stream.next_batch())
            if step % recipe.train.log_every == 0:
                metrics.log(step, figures, seconds=time.perf_counter() - started)
            if (step + 1) % recipe.train.save_every == 0 or step + 1 == steps:
                metrics.flush()
                checkpoint.save(saved, step + 1, recipe, stage)
            progress.update(task, advance=1, loss=float(figures["loss"]))
    weights = folder / f"{recipe.train.stage}.safetensors"
    stage.save(weights)
    return weights


def _vision_stage(recipe: Recipe) -> Stage:
    digits = digits_to_learn(recipe.data)
    size = recipe.vision.image_size
    stream = PictureStream(digits, recipe.data, size, recipe.train.seed)
    tokenizer = begin(recipe)
    return SingleLossStage(recipe, tokenizer, stream, objective.reconstruction, save_vision)


def _tokenizer_stage(recipe: Recipe) -> Stage:
    # Here, because PyAV is slow to import and no other stage needs it.
    from emu3.data.crops import CropStream, load_split

    learned, _ = load_split(recipe.media)
    stream = CropStream(learned, recipe.media, recipe.train.seed)
    perceptual = load_lpips(recipe.objective.lpips) if recipe.objective.lpips else None
    return TokenizerStage(recipe, begin(recipe), stream, perceptual)


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
    return SingleLossStage(recipe, model, stream, objective.next_token, save_decoder)


_STAGES: Mapping[str, Callable[[Recipe], Stage]] = {
    "vision": _vision_stage,
    "tokenizer": _tokenizer_stage,
    "decoder": _decoder_stage,
}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
