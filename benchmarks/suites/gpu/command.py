"""The command: what it is told, what it says, and the page at the end."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness import machine, results, run
from benchmarks.report import pages
from benchmarks.suites.gpu.plan import ITEMS, Item
from benchmarks.suites.gpu.visit import Visit

GIB_OF_WORKER = 12
"""Memory of the GPU for each process that compiles and checks."""
MOST_WORKERS = 8


def gpu(
    minutes: Annotated[float, typer.Option(help="Stop in time for so many minutes.")] = 8.0,
    op: Annotated[list[str] | None, typer.Option(help="Op, model, vision …; all.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Tiny sizes on the CPU, no results.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where rows and page go.")] = None,
) -> None:
    """Check, compile and time every op, a training step, a decoded token and the tokenizer."""
    device = "cpu" if dry_run else "cuda"
    if not dry_run and not torch.cuda.is_available():
        typer.echo("gpu: must find a GPU, got none; --dry-run runs on the CPU", err=True)
        raise typer.Exit(1)
    items = [item.as_dry_run() if dry_run else item for item in chosen(op)]
    name = "dry-run" if dry_run else machine.kind()
    folder = folder or (Path(tempfile.mkdtemp()) if dry_run else results.RESULTS)
    with progress() as shown:
        visit = make(items, device, minutes, folder / f"{name}.jsonl", shown)
        try:
            visit.run(num_workers(device))
        finally:
            finish(visit, name)
    if visit.failed:
        raise typer.Exit(1)


def chosen(ops: list[str] | None) -> list[Item]:
    known = dict.fromkeys(item.op for item in ITEMS)
    if unknown := sorted(set(ops or ()) - set(known)):
        raise typer.BadParameter(f"--op must be of {', '.join(known)}, got {', '.join(unknown)}")
    return [item for item in ITEMS if not ops or item.op in ops]


def progress() -> Progress:
    """Return a bar that only a terminal shows; every item has a line anyway."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("steps,"), TimeElapsedColumn()
    return Progress(*columns, console=run.console, disable=not run.console.is_terminal)


def make(items: list[Item], device: str, minutes: float, path: Path, shown: Progress) -> Visit:
    facts, commit = machine.facts(), machine.commit()
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    run.console.print(f"{facts['gpu'] or facts['cpu']}. {versions}", markup=False)
    made = results.made_by(facts, commit, commit["time"])
    start = time.monotonic()
    task = shown.add_task("", total=2 * len(items))  # each is prepared and timed

    def say(line: str) -> None:
        shown.advance(task)
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        run.console.print(f"[{minutes}:{seconds:02}] {line}", markup=False)

    return Visit(items, device, 60 * minutes, path, made, say, Shown())


class Shown:
    """Prints every row and every reason once."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def __call__(self, row: dict) -> None:
        *_, direction, backend, ours, fastest, times, _ = pages.against_best(row)
        line = f"{row['op']} {direction}: {backend} {ours}; {fastest} ({times})"
        self.tell(results.identity(row), line)
        for name, why in row["missing"].items():
            self.tell(f"{name}: {why}", f"without {name}: {why}")

    def tell(self, key: str, line: str) -> None:
        if key not in self.told:
            self.told.add(key)
            run.console.print(f"       {line}", markup=False)


def num_workers(device: str) -> int:
    """Count the processes that compile: by cores, and by the memory of the GPU."""
    if device == "cpu":
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory // (GIB_OF_WORKER << 30)
    return max(1, min(MOST_WORKERS, machine.cores() - 1, memory))


def finish(visit: Visit, name: str) -> None:
    """Write the page from what is stored; name what failed and what was left out."""
    folder = visit.path.parent
    if rows := results.read(visit.path):
        run.console.print(f"wrote {pages.write_page(folder, name, rows)}", markup=False)
    for what, listed in (("FAILED", visit.failed), ("left out", visit.left_out)):
        for item, why in listed.items():
            run.console.print(f"{what}: {item}: {why}", markup=False)
