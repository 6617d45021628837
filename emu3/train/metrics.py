"""Metrics of every logged step: one JSON line, and TensorBoard.

The JSON lines contain no times, so that two runs of one recipe write the same bytes; what depends
on the machine goes to TensorBoard alone.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from emu3.files import replacing


class Metrics:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in ``folder``, from ``step`` on.

    Lines of later steps, of a run that was killed after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        _truncate(self.path, step)
        self._lines = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, values: Mapping[str, Tensor | float], **measured: float) -> None:
        """Record the metrics of one step, and what was measured on this machine: its seconds."""
        numbers = {name: float(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, value in {**numbers, **measured}.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flush every line to disk: a checkpoint may not be ahead of its metrics."""
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self.flush()
        self._lines.close()
        self._board.close()


def numbers_of(steps: Sequence[Mapping[str, Tensor | float]]) -> list[dict[str, float]]:
    """Return the metrics of ``steps`` as numbers, by one read from each device."""
    tensors: dict[torch.device, list[Tensor]] = {}
    for value in (value for metrics in steps for value in metrics.values()):
        if isinstance(value, Tensor):
            tensors.setdefault(value.device, []).append(value.detach().double())
    read = {device: iter(torch.stack(values).tolist()) for device, values in tensors.items()}
    return [
        {n: next(read[v.device]) if isinstance(v, Tensor) else float(v) for n, v in metrics.items()}
        for metrics in steps
    ]


def are_on_gpu(metrics: Mapping[str, Tensor | float]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in metrics.values())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged steps; an incomplete last line is skipped.

    Raises:
        ValueError: a line without a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [_parse(line, f"line {number} of {path}") for number, line in enumerate(whole, 1)]


def _parse(line: str, where: str) -> dict[str, float]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError(f"metrics: {where} must hold a step and its metrics, got {line.strip()!r}")
    return values


def _truncate(path: Path, step: int) -> None:
    kept = [values for values in read_metrics(path) if values["step"] < step]
    with replacing(path) as draft:
        draft.write_text("".join(json.dumps(values) + "\n" for values in kept))
