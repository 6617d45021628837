"""One measured run: a session of pytest that is printed, and published on a quiet machine."""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import typer
from rich.console import Console

from benchmarks import clock, contestants, machine
from benchmarks.report import RESULTS, publish
from benchmarks.tables import as_table

console = Console(width=200 if not sys.stdout.isatty() else None)

PYTEST = (
    *("--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"),
    # The project's own options skip benchmarks and stop a test after five minutes.
    *("-o", "addopts=", "-o", "timeout=0", "-p", "no:cacheprovider"),
    *("-W", "ignore::DeprecationWarning", "-q", "-rs", "--tb=short", "--no-header"),
)

WHOLE = ("model", "vision")
"""What is timed as a whole, by a suite of its own."""

IMPORTED = ["benchmarks.contestants", "torch._inductor.compile_fx"]
"""What every run would import anew: torch and its compiler, some five seconds."""


@dataclass(frozen=True)
class Run:
    """What one session times: an op or the model, on each number of threads or on the GPU."""

    op: str
    threads: tuple[int, ...]
    seconds: float
    device: str = "cpu"
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = " and ".join(map(str, self.threads))
        return f"{self.op}, {'GPU' if self.device == 'cuda' else f'{counts} threads'}"

    def arguments(self) -> list[str]:
        """Return the options of pytest that make this run."""
        return [
            *(f"--op={self.op}", *(f"--threads={count}" for count in self.threads)),
            f"--seconds={self.seconds}",
            *(f"--device={self.device}", f"--benchmark-timer={clock.of(self.device).name}"),
            *self.options,
        ]


def runs(
    ops: list[str], threads: list[int] | None, seconds: float, *options: str, scale: bool = True
) -> list[Run]:
    """List a run for each op, on 1 and 2 threads unless told otherwise; on all on a GPU."""
    if machine.device() == "cuda":
        counts = [machine.cores()]
    else:
        counts = threads or sorted({1, min(2, machine.cores())})
    if max(counts) > machine.cores():
        raise typer.BadParameter(f"--threads must be at most {machine.cores()}, got {max(counts)}")
    how = (*options, "--scale") if scale else options
    timed = [op for op in ops if op in WHOLE or contestants.ours(op)]
    for op in sorted(set(ops) - set(timed)):
        console.print(f"not timed: {op}, which is left to PyTorch on this machine")
    return [Run(op, tuple(counts), seconds, machine.device(), how) for op in timed]


def time_all(listed: list[Run], allow_load: bool) -> list[str]:
    """Time every run; return why some are not published."""
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        return [f"{reason}; --allow-load times and writes nothing"]
    failures, start = [], time.monotonic()
    for index, run in enumerate(listed, 1):
        progress(index, len(listed), str(run), start)
        if reason := time_one(run, write=not allow_load):
            failures.append(f"{run}: {reason}")
    return failures


def progress(index: int, total: int, what: str, start: float) -> None:
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(f"[{index}/{total}] {what} ({minutes}:{seconds:02} so far)", markup=False)


def time_one(run: Run, write: bool) -> str | None:
    """Time ``run``, print it, publish it; return why it is not published."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "run.json")
        status = run_pytest(run, stored)
        timed = json.loads(stored.read_text()) if stored.exists() else {"benchmarks": []}
    rows = [benchmark["extra_info"] for benchmark in timed["benchmarks"]]
    if rows:
        console.print(as_table(run.op, rows))
    if status != pytest.ExitCode.OK or not rows:
        return "a check failed, see above" if rows else "no backend could be timed, see above"
    if not write:
        return None
    if reason := machine.why_not_publish(*(load for row in rows for load in row["load"])):
        return reason
    for count in sorted({row["threads"] for row in rows}):
        on = [b for b in timed["benchmarks"] if b["extra_info"]["threads"] == count]
        written = publish(RESULTS / machine.kind(), run.op, count, timed | {"benchmarks": on})
        console.print(f"wrote {written}")
    return None


def run_pytest(run: Run, stored: Path) -> int:
    """Let pytest-benchmark time ``run`` and store the figures at ``stored``.

    In a process of its own, whose memory is gone with it: the allocator gives none back. It is a
    copy of one that has done nothing but the imports.
    """
    suite = Path(__file__).with_name(f"test_{run.op if run.op in WHOLE else 'ops'}.py")
    arguments = [str(suite), *run.arguments(), f"--benchmark-json={stored}", *PYTEST]
    copies = get_context("forkserver")
    # CUDA does not work in the copy of a process that has asked for a GPU, as our imports do.
    copies.set_forkserver_preload(IMPORTED if run.device == "cpu" else [])
    process = copies.Process(target=session, args=(arguments,))
    process.start()
    process.join()
    return process.exitcode


def session(arguments: list[str]) -> None:
    sys.exit(pytest.main(arguments))


def refuse(reasons: list[str]) -> None:
    """Stop with the reasons why something is not published; go on if there is none."""
    if reasons:
        typer.echo(f"benchmarks: refusing to publish: {'; '.join(reasons)}", err=True)
        raise typer.Exit(1)


ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
"""Freed memory stays with the process: without it a fresh result costs page faults, up to three
times the op. The cache of small blocks is off: it keeps what aligning cuts off a large one, which
then is too short when it is freed for the next of its size, and that is fresh again. glibc reads
the settings at start only, so the process starts itself again."""

QUIET = {"KINETO_LOG_LEVEL": "6"}


def start_again_alike() -> None:
    """Start again where the environment is not the one that every contestant needs."""
    wanted = {**os.environ, **ALLOCATOR, **QUIET}
    wanted.pop("TRITON_INTERPRET", None)  # an interpreter is no contestant
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], wanted)
