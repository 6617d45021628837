"""Kill runs at random moments and inside saves, continue them, and compare with the unbroken run.

    python -m tests.e2e.kills --times 200

Exit code 0 if every file was whole after every kill, no more steps were lost than since the last
checkpoint, and each continued run left the files of the unbroken one, byte for byte, and no other.
"""

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from emu3.train import checkpoint
from emu3.train.metrics import read_metrics
from emu3.weights import read_tensors
from tests import children
from tests.e2e.jobs import Event, Run, content, live, prepare

SHARE = {
    "vision": 4,
    "tokenizer": 4,
    "decoder": 4,
    "tokenize": 4,
    "detokenize": 3,
    "prepare": 3,
    "demo": 1,
}
"""Of 23 runs."""
MOST_KILLS = 3
"""Of one run, before it is left alone."""
SAVE_EVERY = 2
"""Steps of the tiny recipes from one checkpoint to the next."""
UNTOUCHED = "tensorboard"
"""A folder that gains a file with every start."""


@dataclass
class Job:
    """A run, what the unbroken run left, and what was found."""

    name: str
    run: Run
    whole: Path
    seconds: float
    events: int
    kills: Counter = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(
        default_factory=lambda: {kind: [] for kind in ("damaged", "lost", "differs", "left")}
    )


def kill(times: int, seed: int, folder: Path) -> list[Job]:
    """Kill ``times`` times in all, with progress; return every kind of run with its faults."""
    forkserver.set_forkserver_preload(["tests.e2e.jobs"])
    forkserver.ensure_running()
    chosen = random.Random(seed)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("unbroken runs", total=times)
        jobs = [_unbroken(name, run, folder) for name, run in _prepared(folder).items()]
        order = [job for job in jobs for _ in range(SHARE[job.name])]
        left = times
        while left > 0:
            job = chosen.choice(order)
            killed = _break(job, folder / "broken", chosen, min(left, MOST_KILLS))
            left -= killed
            progress.update(task, advance=killed, description=job.name)
    return jobs


def _prepared(folder: Path) -> dict[str, Run]:
    return children.run(prepare, folder / "data")


def _unbroken(name: str, run: Run, folder: Path) -> Job:
    started, whole = time.perf_counter(), folder / "whole" / name
    events = children.run(live, run, whole, folder / "log", None)
    return Job(name, run, whole, time.perf_counter() - started, events)


def _break(job: Job, out: Path, chosen: random.Random, most: int) -> int:
    """Kill one run up to ``most`` times, then let it end; return how often it was killed."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_name("log")
    killed = 0
    for _ in range(chosen.randint(1, most)):
        if not _killed(job, out, log, chosen):
            break
        killed += 1
        _examine(job, out)
    code = children.exit_code(live, job.run, out, log, None)
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()
        job.faults["differs"].append(f"restart ended with {code}: {lines[-1] if lines else ''}")
        return killed
    _compare(job, out)
    return killed


def _killed(job: Job, out: Path, log: Path, chosen: random.Random) -> bool:
    """Whether the run was killed, and had not ended before."""
    if at_random := chosen.random() < 0.5:
        process, _ = children.start(live, job.run, out, log, None)
        process.join(chosen.uniform(0, job.seconds))
        process.kill()
        process.join()
        code = process.exitcode
    else:
        event = Event(chosen.randint(1, job.events), chosen.random() < 0.5, chosen.random() < 0.5)
        code = children.exit_code(live, job.run, out, log, event)
    if code == -signal.SIGKILL:
        job.kills["moment" if at_random else "inside"] += 1
    return code == -signal.SIGKILL


def _examine(job: Job, out: Path) -> None:
    """Every file that has its name must be whole, and a checkpoint not far behind its curve."""
    for name in _visible(out):
        path, whole = out / name, job.whole / name
        if path.name == "metrics.jsonl" and whole.is_file():
            if not whole.read_bytes().startswith(path.read_bytes()):
                job.faults["damaged"].append(f"{name} is not the beginning of the curve")
        elif path.name == checkpoint.FILE:
            _examine_checkpoint(job, path)
        elif not whole.is_file() or content(path) != content(whole):
            job.faults["damaged"].append(str(name))


def _examine_checkpoint(job: Job, path: Path) -> None:
    try:
        saved = int(read_tensors(path)[1]["step"])
    except ValueError as error:
        job.faults["damaged"].append(str(error))
        return
    logged = len(read_metrics(path.with_name("metrics.jsonl")))
    if not saved <= logged <= saved + SAVE_EVERY:
        job.faults["lost"].append(f"{path}: {logged} steps were done, {saved} are saved")


def _compare(job: Job, out: Path) -> None:
    there, expected = set(_visible(out)), set(_visible(job.whole))
    job.faults["differs"] += [f"{name} is missing" for name in expected - there]
    job.faults["left"] += [str(name) for name in there - expected]
    drafts = (path for path in out.rglob("*") if path.is_file() and ".part" in str(path))
    job.faults["left"] += [str(path.relative_to(out)) for path in drafts]
    for name in there & expected:
        if content(out / name) != content(job.whole / name):
            job.faults["differs"].append(str(name))


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == UNTOUCHED for part in name.parts)
        if path.is_file() and not hidden:
            yield name


def _show(jobs: list[Job]) -> None:
    kinds = list(jobs[0].faults)
    table = Table("run", "seconds", "points to die at", "kills", "at a point", *kinds)
    for job in jobs:
        found = [str(len(job.faults[kind])) for kind in kinds]
        size = f"{job.seconds:.1f}", str(job.events)
        table.add_row(job.name, *size, str(job.kills.total()), str(job.kills["inside"]), *found)
    total = sum((job.kills for job in jobs), Counter())
    sums = [str(sum(len(job.faults[kind]) for job in jobs)) for kind in kinds]
    table.add_section()
    table.add_row("all", "", "", str(total.total()), str(total["inside"]), *sums)
    console = Console(width=100)
    console.print(table)
    for job in jobs:
        for kind, lines in job.faults.items():
            for line in lines:
                console.print(f"{job.name}: {kind}: {line}", markup=False, soft_wrap=True)


def main(
    times: Annotated[int, typer.Option(help="number of kills")] = 200,
    seed: Annotated[int, typer.Option(help="of what is killed, and where")] = 0,
) -> None:
    """Kill runs at random moments and inside saves; compare with the unbroken run."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = kill(times, seed, Path(folder))
    _show(jobs)
    raise typer.Exit(any(lines for job in jobs for lines in job.faults.values()))


if __name__ == "__main__":
    typer.run(main)
