"""The miniature after pre-training: quality, preferences and instructions, each measured.

The decoder's first training is short on purpose: a model that makes mistakes can learn from them.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emu3.demo import tune_dpo, tune_quality, tune_understand
from emu3.demo.miniature import Clock
from emu3.demo.run import demo_recipes, machine, show, train_miniature
from emu3.files import replacing
from emu3.train.lock import locked

Stage = Callable[[Path, Path, Clock], dict[str, float]]
"""Tunes the miniature of a folder in a new one, and returns what it measured."""

STAGES: Mapping[str, Stage] = {
    "quality": tune_quality.run,
    "preferences": tune_dpo.run,
    "understand": tune_understand.run,
}
DECODER_WORDS = ("train.steps=600",)
"""Of 1,600 steps of the recipe."""


def run_tune(
    folder: Path,
    vision: Sequence[str] = (),
    decoder: Sequence[str] = (),
    *,
    stages: Mapping[str, Stage] = STAGES,
) -> dict:
    """Train the miniature for a short time and tune it; write images and ``report.json``.

    Args:
        folder: to fill; each stage has a folder of its own in it.
        vision: ``key=value`` overrides of the tokenizer's recipe.
        decoder: ``key=value`` overrides of the decoder's recipe.
        stages: by their names, each from the same weights.

    Returns:
        the contents of ``report.json``.

    Raises:
        ValueError: one line, if another process trains in ``folder`` or in one of its runs.
    """
    words = [*DECODER_WORDS, *decoder]
    first, second = demo_recipes(folder / "runs", vision, words, video=False)
    with locked(folder):
        clock, metrics = Clock(), {}
        mini = train_miniature(folder / "runs", clock, first, second)
        for name, run in stages.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
            metrics |= run(folder, folder / name, clock)
        seconds = {**clock.seconds, "total": round(sum(clock.seconds.values()), 2)}
        report = {
            **metrics,
            "decoder_steps": second.train.steps,
            "decoder_parameters": sum(p.numel() for p in mini.model.parameters()),
            "seconds": seconds,
            "machine": machine(),
        }
        with replacing(folder / "report.json") as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n")
    show(folder, report)
    return report
