"""Stored results: one JSON file per machine, one line per row, in a stable order."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.machine import ROOT

RESULTS = ROOT / "benchmarks/results"
DIGITS = 6
"""Significant digits of a stored number: rounds vary by more than a thousandth."""
IDENTITY = ("suite", "op", "backend", "size", "dtype", "direction", "device", "threads")
"""A row replaces the stored row that is equal in these."""
NOT_TIMED = "not timed"
"""The suite of a row that only says why there is none."""


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def store(path: Path, rows: Iterable[dict]) -> Path:
    """Add ``rows`` to the file, in place of stored rows of the same identity."""
    merged = {identity(row): row for row in (*read(path), *map(rounded, rows))}
    return write(path, lines(sorted(merged.values(), key=order)))


def lines(rows: Iterable[dict]) -> str:
    """Write each row as a line of JSON."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def identity(row: dict) -> str:
    """Identify a row; a size by its values, since their names may change."""
    size = list(row["size"].values())
    return json.dumps([row.get(name) if name != "size" else size for name in IDENTITY])


def order(row: dict) -> tuple:
    words = row["op"], row["direction"], row["dtype"], row.get("suite", "")
    return *words, size_order(row), row["threads"] or 0, row["backend"]


def size_order(row: dict) -> tuple:
    """Order sizes by their values, numbers as numbers."""
    values = row["size"].values()
    return tuple((1, 0, str(v)) if not isinstance(v, (int, float)) else (0, v, "") for v in values)


def rounded(value: object) -> object:
    """Round every float in ``value`` to ``DIGITS`` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def of_session(timed: dict) -> list[dict]:
    """Return the rows of a session of pytest-benchmark, each with its machine and commit."""
    made = made_by(timed["machine_info"], timed["commit_info"], timed["datetime"])
    return [benchmark["extra_info"] | made for benchmark in timed["benchmarks"]]


def made_by(machine: dict, commit: dict, when: str) -> dict:
    """Say where, when and from which commit a row was measured."""
    return {
        "commit": (commit["id"] or "")[:12] + ("-dirty" if commit["dirty"] else ""),
        "date": when[:10],
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "memory_gib": machine["memory_gib"],
        "gpu": machine.get("gpu"),
        "cpu_level": machine["cpu_level"],
        "system": machine["system"],
        "versions": {"python": machine["python_version"]}
        | {name: version for name, version in machine["versions"].items() if version},
    }


def write(path: Path, text: str) -> Path:
    """Write the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    os.replace(unfinished.name, path)
    return path
