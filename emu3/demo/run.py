"""The demo, start to finish: two trainings, three measurements, plots and a report."""

import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emu3.config import load_recipe
from emu3.demo import plots
from emu3.demo.config import ClipRecipe, DigitRecipe
from emu3.demo.digits import caption, load_split
from emu3.demo.judge import DigitJudge, judge_color
from emu3.demo.measure import (
    Captioned,
    Generated,
    fused_speedup,
    measure_captions,
    measure_generation,
    paint_validation,
    share,
)
from emu3.demo.miniature import Clock, Miniature
from emu3.demo.run_moving import run_moving
from emu3.demo.stages import decoder_stage, vision_stage
from emu3.demo.stream import DocumentStream
from emu3.files import replacing
from emu3.text import ByteTokenizer
from emu3.train.lock import locked
from emu3.train.loop import train
from emu3.train.metrics import read_metrics
from emu3.weights import load_decoder, load_vision
from emu3_kernels import record_backends

# Every digit in every colour, this many times: 320 images, a standard error below 2.5 %.
_ROUNDS = 4


def run_demo(
    folder: Path,
    vision: Sequence[str] = (),
    decoder: Sequence[str] = (),
    *,
    video: bool = False,
) -> dict:
    """Train the miniature; write plots and ``report.json`` to ``folder``.

    Every number but seconds and speeds depends on the recipes' seeds alone.

    Args:
        vision: ``key=value`` overrides of the tokenizer's recipe.
        decoder: ``key=value`` overrides of the decoder's recipe.
        video: train on clips and questions too, and measure and show them.

    Returns:
        the contents of ``report.json``.

    Raises:
        ValueError: one line, if another process trains in ``folder`` or in one of its runs.
    """
    recipes = demo_recipes(folder / "runs", vision, decoder, video=video)
    with locked(folder):
        report = _run(folder, *recipes)
    show(folder, report)
    return report


def demo_recipes(
    runs: Path, vision: Sequence[str], decoder: Sequence[str], *, video: bool
) -> tuple[DigitRecipe, DigitRecipe]:
    """The recipes of the vision tokenizer and of the decoder, which will be trained in ``runs``."""
    names = ("clips-vision", "clips") if video else ("vision", "digits")
    kind = ClipRecipe if video else DigitRecipe
    first = load_recipe(names[0], vision, kind)
    path = runs / "vision" / f"{first.train.stage}.safetensors"
    words = [f"data.tokenizer={json.dumps(str(path))}", *decoder]
    second = load_recipe(names[1], words, kind)
    if second.data.validation != first.data.validation:
        raise ValueError(
            "demo: both recipes must have the same validation digits, got data.validation "
            f"{first.data.validation} and {second.data.validation}"
        )
    return first, second


def _run(folder: Path, first: DigitRecipe, second: DigitRecipe) -> dict:
    clock = Clock()
    mini = train_miniature(folder / "runs", clock, first, second)
    with clock.stage("judge"):
        size, data = mini.tokenizer.settings.image_size, mini.recipe.data
        judge = DigitJudge(mini.train_set, data, size, data.side)
        shown, colors = paint_validation(mini.validation_set, size, data.side)
    with clock.stage("generate"):
        generated = measure_generation(mini.model, mini.tokenizer, mini.text, judge, rounds=_ROUNDS)
    with clock.stage("caption"):
        captioned = measure_captions(
            mini.model, mini.tokenizer, mini.text, shown, mini.validation_set.labels, colors
        )
    with clock.stage("compare_backends"):
        speed = _compare_backends(mini)
    moving = run_moving(folder, mini, clock) if isinstance(second, ClipRecipe) else {}
    reconstructed = mini.tokenizer.decode(mini.tokenizer.encode(shown)).clamp(-1, 1)
    with clock.stage("plots"):
        _write_plots(folder, mini, generated, captioned, reconstructed, colors)
    report = {
        **_accuracies(mini, judge, generated, captioned, reconstructed, colors),
        **moving,
        **speed,
        **_speeds(folder / "runs", generated, clock.seconds),
        "captions": _samples(mini, captioned, colors),
        "machine": machine(),
    }
    with replacing(folder / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n")
    return report


def train_miniature(runs: Path, clock: Clock, first: DigitRecipe, second: DigitRecipe) -> Miniature:
    """Train the vision tokenizer and the decoder in ``runs``, which is emptied first."""
    with locked(runs / "vision"), locked(runs / "decoder"):  # no training lives in either
        shutil.rmtree(runs, ignore_errors=True)
    train_set, validation_set = load_split(first.data.validation)
    with clock.stage("train_tokenizer"):
        vision_file = train(first, runs / "vision", vision_stage)
    with clock.stage("train_decoder"):
        decoder_file = train(second, runs / "decoder", decoder_stage)
    return Miniature(
        second,
        load_decoder(decoder_file),
        load_vision(vision_file),
        ByteTokenizer(second.model.vocabulary),
        train_set,
        validation_set,
    )


def _compare_backends(mini: Miniature) -> dict:
    stream = DocumentStream(mini.train_set, mini.recipe, mini.tokenizer, mini.text)
    with record_backends() as used:
        tokens, weights = stream.next_batch()
        mini.model.loss(tokens, weights)
    return {"backends": used, "fused_speedup": fused_speedup(mini.model, tokens, weights)}


def _write_plots(
    folder: Path,
    mini: Miniature,
    generated: Generated,
    captioned: Captioned,
    reconstructed: Tensor,
    colors: Tensor,
) -> None:
    few = _spread(len(captioned.images), 20)
    plots.draw_grid(folder / "generated.png", generated.images[0])
    plots.draw_reconstructions(
        folder / "reconstructions.png",
        captioned.images[few],
        reconstructed[few],
        mini.tokenizer.settings.grid,
    )
    some = _spread(len(captioned.images), 24)
    plots.draw_captions(
        folder / "captions.png",
        captioned.images[some],
        [captioned.captions[i] for i in some],
        captioned.digit_right[some],
    )
    losses = {
        name: [line["loss"] for line in read_metrics(folder / "runs" / run / "metrics.jsonl")]
        for name, run in (("vision tokenizer", "vision"), ("decoder", "decoder"))
    }
    plots.draw_curves(folder / "loss.png", losses)


def _accuracies(
    mini: Miniature,
    judge: DigitJudge,
    generated: Generated,
    captioned: Captioned,
    reconstructed: Tensor,
    colors: Tensor,
) -> dict:
    labels = mini.validation_set.labels
    return {
        "generated_digit_accuracy": generated.digit_accuracy,
        "generated_color_accuracy": generated.color_accuracy,
        "caption_digit_accuracy": captioned.digit_accuracy,
        "caption_color_accuracy": captioned.color_accuracy,
        "judge_digit_accuracy_on_validation": share(judge(captioned.images) == labels),
        "judge_color_accuracy_on_validation": share(judge_color(captioned.images) == colors),
        "reconstructed_digit_accuracy": share(judge(reconstructed) == labels),
        "reconstructed_color_accuracy": share(judge_color(reconstructed) == colors),
        "generated_images": generated.images.flatten(0, 2).shape[0],
        "validation_digits": len(mini.validation_set),
        "train_digits": len(mini.train_set),
        "decoder_parameters": sum(p.numel() for p in mini.model.parameters()),
    }


def _speeds(runs: Path, generated: Generated, seconds: dict[str, float]) -> dict:
    trained = sum(line["tokens"] for line in read_metrics(runs / "decoder" / "metrics.jsonl"))
    return {
        "training_tokens_per_second": round(trained / seconds["train_decoder"]),
        "generated_tokens_per_second": round(generated.num_tokens / seconds["generate"]),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
    }


def _samples(mini: Miniature, captioned: Captioned, colors: Tensor) -> list[dict[str, str]]:
    return [
        {
            "shows": caption(int(mini.validation_set.labels[i]), int(colors[i])),
            "says": captioned.captions[i],
        }
        for i in _spread(len(captioned.captions), 24)
    ]


def machine() -> dict:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _spread(count: int, wanted: int) -> list[int]:
    return [i * count // wanted for i in range(wanted)]


def show(folder: Path, report: dict) -> None:
    table = Table("metric", "value", title=f"{folder}/report.json")
    for name, value in report.items():
        if isinstance(value, int | float):
            table.add_row(name.replace("_", " "), f"{value:g}")
    table.add_row("seconds in total", f"{report['seconds']['total']:g}")
    Console().print(table)
