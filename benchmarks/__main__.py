"""Front door: ``python -m benchmarks ops | model | codegen | report``, from the root."""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.report import RESULTS, as_table, publish, write_markdown
from emu3_kernels.ops import OPS

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Freed memory stays with the process: without it a fresh result costs page faults, up to three
times the op. glibc reads the settings at start only, so the process starts itself again."""

QUIET = {"KINETO_LOG_LEVEL": "6"}

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(width=200 if not sys.stdout.isatty() else None)


@app.command()
def ops(
    op: Annotated[list[str] | None, typer.Option(help="Op to time; all by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; 1 and 2.")] = None,
    seconds: Annotated[float, typer.Option(help="All rounds of a row may take this long.")] = 2.0,
    allow_load: Annotated[
        bool, typer.Option(help="Time on a busy machine: print, and never write.")
    ] = False,
) -> None:
    """Time the ops beside their peers on this CPU and write benchmarks/results."""
    chosen = op or list(OPS)
    if unknown := sorted(set(chosen) - set(OPS)):
        raise typer.BadParameter(f"--op must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    time_all(chosen, threads or [1, 2], seconds, allow_load)


@app.command()
def model(
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; 2.")] = None,
    seconds: Annotated[float, typer.Option(help="All rounds of a row may take this long.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Train so long too, and compare the losses.")] = 0,
    allow_load: Annotated[
        bool, typer.Option(help="Time on a busy machine: print, and never write.")
    ] = False,
) -> None:
    """Time a training step (no optimizer) beside Hugging Face's Emu3 and write results."""
    if find_spec("transformers") is None:
        refuse("transformers is not installed: pip install 'transformers>=5.23'")
    time_all(["model"], threads or [min(2, machine.cores())], seconds, allow_load, steps)


def time_all(
    chosen: list[str], counts: list[int], seconds: float, allow_load: bool, *options: int
) -> None:
    """Time each of ``chosen`` with each number of threads, unless the machine is busy."""
    if max(counts) > machine.cores():
        raise typer.BadParameter(f"--threads must be at most {machine.cores()}, got {max(counts)}")
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        refuse(f"{reason}; --allow-load times and writes nothing")
    failures = []
    for name in chosen:
        for count in counts:
            if reason := time_one(name, count, seconds, *options, write=not allow_load):
                failures.append(f"{name}, {count} threads: {reason}")
    if failures:
        refuse("; ".join(failures))


def time_one(op: str, threads: int, seconds: float, *options: int, write: bool) -> str | None:
    """Time one op in a session of pytest, print it, publish it; return why it is not published."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "run.json")
        status = run_pytest(op, threads, seconds, stored, *options)
        run = json.loads(stored.read_text()) if stored.exists() else {"benchmarks": []}
    rows = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    if rows:
        console.print(as_table(op, rows))
    if status != pytest.ExitCode.OK or not rows:
        return "a check failed, see above" if rows else "no backend could be timed, see above"
    if not write:
        return None
    if reason := machine.why_not_publish(*(load for row in rows for load in row["load"])):
        return reason
    console.print(f"wrote {publish(RESULTS, op, threads, run)}")
    return None


def run_pytest(op: str, threads: int, seconds: float, stored: Path, steps: int = 0) -> int:
    """Let pytest-benchmark time ``op``, or the model, and store the figures at ``stored``."""
    suite = "test_model.py" if op == "model" else "test_ops.py"
    return pytest.main(
        [
            str(Path(__file__).with_name(suite)),
            *(f"--op={op}", f"--threads={threads}", f"--seconds={seconds}", f"--steps={steps}"),
            *("--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"),
            f"--benchmark-json={stored}",
            # The project's own options skip benchmarks and stop a test after five minutes.
            *("-o", "addopts=", "-o", "timeout=0", "-p", "no:cacheprovider"),
            *("-W", "ignore::DeprecationWarning", "-q", "-rs", "--tb=short", "--no-header"),
        ]
    )


@app.command()
def report() -> None:
    """Write benchmarks/results/README.md from the JSON files beside it."""
    console.print(f"wrote {write_markdown(RESULTS)}")


def refuse(reason: str) -> None:
    typer.echo(f"benchmarks: refusing to publish: {reason}", err=True)
    raise typer.Exit(1)


if find_spec("triton"):
    from benchmarks.codegen import codegen

    app.command()(codegen)


def main() -> None:
    """Start again where the environment is not the one that every contestant needs."""
    wanted = {**os.environ, **ALLOCATOR, **QUIET}
    wanted.pop("TRITON_INTERPRET", None)  # an interpreter is no contestant
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], wanted)
    app()


if __name__ == "__main__":
    main()
