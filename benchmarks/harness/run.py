"""One measured run: a pytest-benchmark session in its own process, stored on a quiet machine."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import typer
from rich.console import Console

from benchmarks.harness import clock, entries, machine, results

console = Console(width=200 if not sys.stdout.isatty() else None)

SUITES = machine.ROOT / "benchmarks/suites"
PYTEST = (
    *("--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"),
    # The project's own options skip benchmarks and stop a test after five minutes.
    *("-o", "addopts=", "-o", "timeout=0", "-p", "no:cacheprovider"),
    *("-W", "ignore::DeprecationWarning", "-q", "-rs", "--tb=short", "--no-header"),
)

WHOLE = ("model", "train", "generate", "vision")
"""Suites of their own; every other name is an op."""

PRELOADED = ["benchmarks.harness.entries", "torch._inductor.compile_fx"]
"""Modules that every run would import again: torch and its compiler, some five seconds."""

Show = Callable[[str, list[dict]], None]


@dataclass(frozen=True)
class Run:
    """What one session times: an op or a suite, on each number of threads or on the GPU."""

    op: str
    threads: tuple[int, ...]
    seconds: float
    device: str = "cpu"
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = " and ".join(map(str, self.threads))
        return f"{self.op}, {'GPU' if self.device == 'cuda' else f'{counts} threads'}"

    def arguments(self) -> list[str]:
        """Return the options of pytest for this run."""
        return [
            *(f"--op={self.op}", *(f"--threads={count}" for count in self.threads)),
            f"--seconds={self.seconds}",
            *(f"--device={self.device}", f"--benchmark-timer={clock.of(self.device).name}"),
            *self.options,
        ]


def runs(
    ops: list[str], threads: list[int] | None, seconds: float, *options: str, scale: bool = True
) -> list[Run]:
    """List a run for each op: on 1 and 2 threads by default, on all cores beside a GPU."""
    if machine.device() == "cuda":
        counts = [machine.cores()]
    else:
        counts = threads or sorted({1, min(2, machine.cores())})
    if max(counts) > machine.cores():
        raise typer.BadParameter(f"--threads must be at most {machine.cores()}, got {max(counts)}")
    how = (*options, "--scale") if scale else options
    timed = [op for op in ops if op in WHOLE or entries.own_backends(op)]
    for op in sorted(set(ops) - set(timed)):
        console.print(f"not timed: {op} has no backend of ours on this machine")
    return [Run(op, tuple(counts), seconds, machine.device(), how) for op in timed]


def time_all(listed: list[Run], allow_load: bool, show: Show) -> list[str]:
    """Time every run; return the reasons why some are not stored."""
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        return [f"{reason}; --allow-load times and writes nothing"]
    failures, start = [], time.monotonic()
    for index, run in enumerate(listed, 1):
        progress(index, len(listed), str(run), start)
        if reason := time_one(run, not allow_load, show):
            failures.append(f"{run}: {reason}")
    return failures


def progress(index: int, total: int, what: str, start: float) -> None:
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(f"[{index}/{total}] {what} ({minutes}:{seconds:02} so far)", markup=False)


def time_one(run: Run, write: bool, show: Show) -> str | None:
    """Time, show and store one run; return the reason why it is not stored, or None."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "run.json")
        status = run_pytest(run, stored)
        timed = json.loads(stored.read_text()) if stored.exists() else {"benchmarks": []}
    rows = results.of_session(timed) if timed["benchmarks"] else []
    if rows:
        show(run.op, rows)
    if status != pytest.ExitCode.OK or not rows:
        return "a check failed, see above" if rows else "no backend could be timed, see above"
    if not write:
        return None
    if reason := machine.why_not_publish(*(load for row in rows for load in row["load"])):
        return reason
    path = results.store(results.RESULTS / f"{machine.kind()}.jsonl", rows)
    console.print(f"wrote {len(rows)} rows to {path}")
    return None


def run_pytest(run: Run, stored: Path) -> int:
    """Let pytest-benchmark time ``run`` and write its JSON to ``stored``.

    Each run has its own process, since the allocator returns no memory. The process is forked from
    one that has made the imports and nothing else.
    """
    suite = SUITES / f"test_{run.op if run.op in WHOLE else 'ops'}.py"
    arguments = [str(suite), *run.arguments(), f"--benchmark-json={stored}", *PYTEST]
    context = get_context("forkserver")
    # CUDA does not work in a fork of a process that has queried a GPU, as our imports do.
    context.set_forkserver_preload(PRELOADED if run.device == "cpu" else [])
    process = context.Process(target=session, args=(arguments,))
    process.start()
    process.join()
    return process.exitcode


def session(arguments: list[str]) -> None:
    sys.exit(pytest.main(arguments))


def refuse(reasons: list[str]) -> None:
    """Exit with the reasons why results are not stored; return if there are none."""
    if reasons:
        typer.echo(f"benchmarks: refusing to publish: {'; '.join(reasons)}", err=True)
        raise typer.Exit(1)


ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
"""Keeps freed memory in the process. Otherwise a fresh result costs page faults, up to three times
the op. The cache of small blocks is off: it keeps the piece that alignment cuts off a large block,
so that the block, once freed, is too short for the next of its size. glibc reads these settings at
start alone, so the process starts itself again."""

QUIET = {"KINETO_LOG_LEVEL": "6"}


def restart_with_allocator() -> None:
    """Start again unless the environment is the one that every entry needs."""
    wanted = {**os.environ, **ALLOCATOR, **QUIET}
    wanted.pop("TRITON_INTERPRET", None)  # the interpreter is not timed
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], wanted)
