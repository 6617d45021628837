"""The demo, start to finish: two trainings, three measurements, pictures and a report."""

import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emu3.config import load_recipe
from emu3.demo import pictures
from emu3.demo.config import DigitRecipe
from emu3.demo.digits import Digits, caption, load_split
from emu3.demo.judge import DigitJudge, judge_color
from emu3.demo.measure import (
    Described,
    Drawn,
    fused_speedup,
    measure_describing,
    measure_drawing,
    paint_held_out,
    share,
)
from emu3.demo.stages import decoder_stage, vision_stage
from emu3.demo.stream import DocumentStream
from emu3.files import replacing
from emu3.model import Emu3
from emu3.text import ByteTokenizer
from emu3.train.loop import train
from emu3.train.metrics import read_metrics
from emu3.vision import VisionTokenizer
from emu3.weights import load_decoder, load_vision
from emu3_kernels import record_backends

# Every digit in every colour, this many times: 320 pictures, a standard error below 2.5 %.
_ROUNDS = 4


@dataclass(frozen=True)
class Miniature:
    """What the two trainings leave, and the digits they did and did not see."""

    recipe: DigitRecipe
    model: Emu3
    tokenizer: VisionTokenizer
    text: ByteTokenizer
    learned: Digits
    held_out: Digits


class Clock:
    """Wall seconds of each stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)


def run_demo(folder: Path, vision: Sequence[str] = (), decoder: Sequence[str] = ()) -> dict:
    """Train the miniature; leave pictures, captions and ``report.json`` in ``folder``.

    Every figure but seconds and speeds depends on the recipes' seeds alone.

    Args:
        vision: ``key=value`` overrides of the tokenizer's recipe.
        decoder: ``key=value`` overrides of the decoder's recipe.

    Returns:
        what ``report.json`` holds.
    """
    clock = Clock()
    mini = _train(folder / "runs", clock, vision, decoder)
    with clock.stage("judge"):
        judge = DigitJudge(mini.learned, mini.recipe.data, mini.tokenizer.settings.image_size)
        shown, colors = paint_held_out(mini.held_out, mini.tokenizer.settings.image_size)
    with clock.stage("draw"):
        drawn = measure_drawing(mini.model, mini.tokenizer, mini.text, judge, rounds=_ROUNDS)
    with clock.stage("describe"):
        described = measure_describing(
            mini.model, mini.tokenizer, mini.text, shown, mini.held_out.labels, colors
        )
    with clock.stage("compare_backends"):
        speed = _compare_backends(mini)
    redrawn = mini.tokenizer.decode(mini.tokenizer.encode(shown)).clamp(-1, 1)
    with clock.stage("pictures"):
        _draw(folder, mini, drawn, described, redrawn, colors)
    report = {
        **_accuracies(mini, judge, drawn, described, redrawn, colors),
        **speed,
        **_speeds(folder / "runs", drawn, clock.seconds),
        "captions": _samples(mini, described, colors),
        "machine": machine(),
    }
    with replacing(folder / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n")
    _show(folder, report)
    return report


def _train(runs: Path, clock: Clock, vision: Sequence[str], decoder: Sequence[str]) -> Miniature:
    shutil.rmtree(runs, ignore_errors=True)
    first = load_recipe("vision", vision, DigitRecipe)
    learned, held_out = load_split(first.data.held_out)
    with clock.stage("train_tokenizer"):
        vision_file = train(first, runs / "vision", vision_stage)
    words = [f"data.tokenizer={json.dumps(str(vision_file))}", *decoder]
    recipe = load_recipe("digits", words, DigitRecipe)
    if recipe.data.held_out != first.data.held_out:
        raise ValueError(
            "demo: both recipes must hold out the same digits, got data.held_out "
            f"{first.data.held_out} and {recipe.data.held_out}"
        )
    with clock.stage("train_decoder"):
        decoder_file = train(recipe, runs / "decoder", decoder_stage)
    return Miniature(
        recipe,
        load_decoder(decoder_file),
        load_vision(vision_file),
        ByteTokenizer(recipe.model.vocabulary),
        learned,
        held_out,
    )


def _compare_backends(mini: Miniature) -> dict:
    stream = DocumentStream(mini.learned, mini.recipe, mini.tokenizer, mini.text)
    with record_backends() as used:
        tokens, weights = stream.next_batch()
        mini.model.loss(tokens, weights)
    return {"backends": used, "fused_speedup": fused_speedup(mini.model, tokens, weights)}


def _draw(
    folder: Path,
    mini: Miniature,
    drawn: Drawn,
    described: Described,
    redrawn: Tensor,
    colors: Tensor,
) -> None:
    few = _spread(len(described.pictures), 20)
    pictures.draw_grid(folder / "drawn.png", drawn.pictures[0])
    pictures.draw_reconstructions(
        folder / "reconstructions.png",
        described.pictures[few],
        redrawn[few],
        mini.tokenizer.settings.grid,
    )
    some = _spread(len(described.pictures), 24)
    pictures.draw_captions(
        folder / "captions.png",
        described.pictures[some],
        [described.captions[i] for i in some],
        described.digit_right[some],
    )
    losses = {
        name: [line["loss"] for line in read_metrics(folder / "runs" / run / "metrics.jsonl")]
        for name, run in (("vision tokenizer", "vision"), ("decoder", "decoder"))
    }
    pictures.draw_curves(folder / "loss.png", losses)


def _accuracies(
    mini: Miniature,
    judge: DigitJudge,
    drawn: Drawn,
    described: Described,
    redrawn: Tensor,
    colors: Tensor,
) -> dict:
    labels = mini.held_out.labels
    return {
        "generated_digit_accuracy": drawn.digit_accuracy,
        "generated_color_accuracy": drawn.color_accuracy,
        "caption_digit_accuracy": described.digit_accuracy,
        "caption_color_accuracy": described.color_accuracy,
        "judge_digit_accuracy_on_held_out": share(judge(described.pictures) == labels),
        "judge_color_accuracy_on_held_out": share(judge_color(described.pictures) == colors),
        "reconstructed_digit_accuracy": share(judge(redrawn) == labels),
        "reconstructed_color_accuracy": share(judge_color(redrawn) == colors),
        "generated_pictures": drawn.pictures.flatten(0, 2).shape[0],
        "held_out_digits": len(mini.held_out),
        "learned_digits": len(mini.learned),
        "decoder_parameters": sum(p.numel() for p in mini.model.parameters()),
    }


def _speeds(runs: Path, drawn: Drawn, seconds: dict[str, float]) -> dict:
    trained = sum(line["tokens"] for line in read_metrics(runs / "decoder" / "metrics.jsonl"))
    return {
        "training_tokens_per_second": round(trained / seconds["train_decoder"]),
        "drawn_tokens_per_second": round(drawn.num_tokens / seconds["draw"]),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
    }


def _samples(mini: Miniature, described: Described, colors: Tensor) -> list[dict[str, str]]:
    return [
        {
            "shows": caption(int(mini.held_out.labels[i]), int(colors[i])),
            "says": described.captions[i],
        }
        for i in _spread(len(described.captions), 24)
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


def _show(folder: Path, report: dict) -> None:
    table = Table("figure", "value", title=f"{folder}/report.json")
    for name, value in report.items():
        if isinstance(value, int | float):
            table.add_row(name.replace("_", " "), f"{value:g}")
    table.add_row("seconds in all", f"{report['seconds']['total']:g}")
    Console().print(table)
