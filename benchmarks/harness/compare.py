"""Our ops beside our ops: the working tree against another commit, in alternating processes.

The cases of the working tree make the inputs once, into files. :mod:`benchmarks.harness.driver`
calls the public functions of either tree on them, so any commit with these functions compares.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import typer
from rich.table import Table

from benchmarks.harness import driver, entries, run
from benchmarks.harness.interleave import paired_ratio
from benchmarks.harness.machine import ROOT, device
from emu3_kernels.testing import suite

NEW, BASE = "new", "base"
SECONDS = 0.3
"""Limit of the samples of one row in one process."""

Times = dict[str, list[float | str]]
"""Milliseconds of each row, one number per process; or the reason why it cannot run."""


def compare(
    ref: str, ops: list[str], threads: int, rounds: int, tree: Path | None, backend: str | None
) -> None:
    """Time ``ops`` in the working tree and at ``ref``, or in a built ``tree``; print the ratios."""
    if tree is not None:
        taken = alternate(tree.resolve(), ops, threads, rounds, backend)
    else:
        with other_tree(resolve(ref)) as built:
            taken = alternate(built, ops, threads, rounds, backend)
    run.console.print(table(str(tree or ref), taken[NEW], taken[BASE]))


def resolve(ref: str) -> str:
    done = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", check=False)
    if done.returncode:
        raise typer.BadParameter(f"REF must be a commit of this repository, got {ref}")
    return done.stdout.strip()


@contextmanager
def other_tree(commit: str) -> Iterator[Path]:
    """Check ``commit`` out in a worktree and build it; remove it afterwards, also on failure."""
    terminate = signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="emu3-base-"))
    tree = folder / "tree"
    try:
        git("worktree", "add", "--detach", str(tree), commit)
        build(tree)
        yield tree
    finally:
        # A second Ctrl-C may not leave the worktree behind.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        shutil.rmtree(folder, ignore_errors=True)
        git("worktree", "prune")
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def build(tree: Path) -> None:
    """Build the native library of ``tree``; its CUDA sources only if there is a GPU."""
    run.console.print("building the other commit: a minute or two")
    without_nvcc = {} if device() == "cuda" else {"CUDA_HOME": str(tree / "no-cuda")}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **without_nvcc},
        check=True,
    )


def alternate(
    base: Path, ops: list[str], threads: int, rounds: int, backend: str | None
) -> dict[str, Times]:
    """Time both trees once per round, each in its own process, in a new random order."""
    sides = {NEW: ROOT, BASE: base}
    taken: dict[str, Times] = {side: {} for side in sides}
    shuffled, start = random.Random(0), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        calls = save_calls(Path(folder), ops, threads, backend)
        for index in range(1, rounds + 1):
            run.progress(index, rounds, "both trees", start)
            for side in shuffled.sample(list(sides), len(sides)):
                for row, ms in time_side(sides[side], calls).items():
                    taken[side].setdefault(row, []).append(ms)
    return taken


def save_calls(folder: Path, ops: list[str], threads: int, backend: str | None) -> Path:
    """Write the inputs of every row, and a list of the rows; return the path of the list."""
    rows, saved = {}, {}
    for op in ops:
        for size, direction, dtype in entries.work_of(op, device()):
            case = entries.Case(op, backend or "default", size, dtype, direction)
            inputs = entries.inputs_of(case)
            key = f"{op}{size}{dtype}"
            if key not in saved:
                saved[key] = str(folder / f"{len(saved)}.pt")
                torch.save(inputs, saved[key])
            leaves = suite.differentiable(op, inputs)
            named = {"op": op, "direction": direction, "leaves": leaves, "inputs": saved[key]}
            rows[str(case)] = named
    stated = {"rows": rows, "threads": threads, "device": device()}
    path = folder / "calls.json"
    path.write_text(json.dumps(stated | {"seconds": SECONDS, "backend": backend}))
    return path


def time_side(tree: Path, calls: Path) -> dict[str, float | str]:
    """Run the driver on ``tree``."""
    result = calls.with_name("result.json")
    done = subprocess.run(
        [sys.executable, driver.__file__, str(tree), str(calls), str(result)],
        cwd=tree,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks: {tree} must run, got\n{done.stdout}{done.stderr}")
    return json.loads(result.read_text())


def table(base: str, new: Times, old: Times) -> Table:
    """Lay every row of the working tree out beside that of ``base``."""
    shown = Table(
        title=f"MEASURED: time at {base} over time of the working tree; above 1 the new is faster",
        caption="median (range) of the paired ratios of processes",
    )
    for column in ("row", "new ms", "base ms", "base over new"):
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for row in sorted(new.keys() | old.keys()):
        ours, theirs = new.get(row, []), old.get(row, [])
        shown.add_row(row, milliseconds(ours), milliseconds(theirs), ratio(ours, theirs))
    return shown


def ratio(ours: list[float | str], theirs: list[float | str]) -> str:
    for who, taken in (("the working tree", ours), ("the base", theirs)):
        if reason := next((str(ms)[:80] for ms in taken if isinstance(ms, str)), None):
            return f"{who} cannot run it: {reason}"
    return "{median:.2f}x ({min:.2f}-{max:.2f})".format(**paired_ratio(theirs, ours))


def milliseconds(taken: list[float | str]) -> str:
    numbers = sorted(ms for ms in taken if not isinstance(ms, str))
    return f"{numbers[len(numbers) // 2]:.3g}" if numbers else "-"


def git(*args: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=check)
