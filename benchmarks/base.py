"""Ours beside ours: the working tree against another commit, in rounds of processes that alternate.

The other commit is checked out in a worktree of git, built there, and timed by the benchmarks,
tests and sizes of the working tree, so that both do the same work.
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

import typer
from rich.table import Table

from benchmarks import run
from benchmarks.duel import paired_ratio
from benchmarks.machine import ROOT, device

NEW, BASE = "new", "base"
SECONDS = 0.3
"""What the rounds of one row in one process may take."""

Times = dict[str, list[float]]
"""Median milliseconds of each row by its name, one figure a process."""


def compare(ref: str, ops: list[str], threads: int, rounds: int) -> None:
    """Time ``ops`` of the working tree and of ``ref`` and print the ratios."""
    commit = resolve(ref)
    with other_tree(commit) as tree:
        there = [op for op in ops if (tree / "emu3_kernels/ops" / op).is_dir()]
        sides = {NEW: (ROOT, ops), BASE: (tree, there)}
        taken = alternate(sides, threads, rounds)
    run.console.print(table(f"{ref} ({commit[:12]})", taken[NEW], taken[BASE]))


def resolve(ref: str) -> str:
    done = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", check=False)
    if done.returncode:
        raise typer.BadParameter(f"--base must be a commit of this repository, got {ref}")
    return done.stdout.strip()


@contextmanager
def other_tree(commit: str) -> Iterator[Path]:
    """Check ``commit`` out and build it; whatever happens, nothing of it stays behind."""
    terminate = signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="emu3-base-"))
    tree = folder / "tree"
    try:
        git("worktree", "add", "--detach", str(tree), commit)
        build(tree)
        transplant(tree)
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
    """Build the native library of ``tree``; its CUDA sources where there is a GPU to run them."""
    run.console.print("building the base: a minute or two")
    without_nvcc = {} if device() == "cuda" else {"CUDA_HOME": str(tree / "no-cuda")}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **without_nvcc},
        check=True,
    )


def transplant(tree: Path) -> None:
    """Put the benchmarks, tests and sizes of the working tree into ``tree``."""
    for name in ("benchmarks", "tests"):
        shutil.rmtree(tree / name, ignore_errors=True)
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    for cases in ROOT.glob("emu3_kernels/ops/*/cases.py"):
        if (tree / cases.relative_to(ROOT)).parent.is_dir():
            shutil.copy(cases, tree / cases.relative_to(ROOT))


def alternate(
    sides: dict[str, tuple[Path, list[str]]], threads: int, rounds: int
) -> dict[str, Times]:
    """Time both sides once a round, each in a process of its own, in an order drawn anew."""
    taken: dict[str, Times] = {side: {} for side in sides}
    shuffled, start = random.Random(0), time.monotonic()
    for index in range(1, rounds + 1):
        run.progress(index, rounds, "both sides", start)
        for side in shuffled.sample(list(sides), len(sides)):
            for row, ms in time_side(*sides[side], threads).items():
                taken[side].setdefault(row, []).append(ms)
    return taken


def time_side(tree: Path, ops: list[str], threads: int) -> dict[str, float]:
    """Time every row of ``ops`` as ``tree`` computes them; a row that cannot run is left out."""
    if not ops:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "run.json")
        wanted = [
            *run.Run(ops[0], (threads,), SECONDS, device()).arguments(),
            *(f"--op={op}" for op in ops[1:]),
        ]
        suite = [str(tree / "benchmarks/test_base.py"), f"--benchmark-json={stored}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *suite, *wanted, *run.PYTEST],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
        )
        if not stored.exists():
            raise RuntimeError(f"benchmarks: {tree.name} must run, got\n{done.stdout}{done.stderr}")
        timed = json.loads(stored.read_text())["benchmarks"]
    return {t["extra_info"]["row"]: t["extra_info"]["ms"] for t in timed}


def table(base: str, new: Times, old: Times) -> Table:
    """Set every row of ours beside the base's, where both have it."""
    shown = Table(
        title=f"MEASURED: time of {base} over time of the working tree; above 1 the new is faster",
        caption="median (range) of the paired ratios of processes",
    )
    for column in ("row", "new ms", "base ms", "new over base"):
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for row in sorted(new.keys() | old.keys()):
        ours, theirs = new.get(row, []), old.get(row, [])
        if len(ours) == len(theirs):
            ratio = "{median:.2f}x ({min:.2f}-{max:.2f})".format(**paired_ratio(theirs, ours))
        else:
            ratio = "the base cannot run it" if ours else "the working tree cannot run it"
        shown.add_row(row, milliseconds(ours), milliseconds(theirs), ratio)
    return shown


def milliseconds(taken: list[float]) -> str:
    return f"{sorted(taken)[len(taken) // 2]:.3g}" if taken else "-"


def git(*args: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=check)
