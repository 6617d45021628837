"""Figures of every logged step: one JSON line, and TensorBoard.

The JSON lines hold nothing that depends on the clock, so that two runs of one recipe leave the
same bytes; seconds go to TensorBoard alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from emu3.files import replacing


class Metrics:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in ``folder``, from ``step`` on.

    Lines of later steps, left by a run that was killed after its last checkpoint, are cut.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        _cut(self.path, step)
        self._lines = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, figures: Mapping[str, Tensor | float], *, seconds: float) -> None:
        """Record the figures of one step, and the time it took."""
        values = {name: float(value) for name, value in figures.items()}
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in {**values, "seconds": seconds}.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring every line to the disk: a checkpoint may not run ahead of its curve."""
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self.flush()
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged steps; a last line that was cut short is passed over.

    Raises:
        ValueError: a line that is not of a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [_figures(line, f"line {number} of {path}") for number, line in enumerate(whole, 1)]


def _figures(line: str, where: str) -> dict[str, float]:
    try:
        figures = json.loads(line)
    except json.JSONDecodeError:
        figures = None
    if not isinstance(figures, dict) or not isinstance(figures.get("step"), int):
        raise ValueError(f"metrics: {where} must hold a step and its figures, got {line.strip()!r}")
    return figures


def _cut(path: Path, step: int) -> None:
    kept = [figures for figures in read_metrics(path) if figures["step"] < step]
    with replacing(path) as draft:
        draft.write_text("".join(json.dumps(figures) + "\n" for figures in kept))
