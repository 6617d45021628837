"""Benchmarks: ``python -m benchmarks COMMAND``, from the root of the repository."""

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import compare as other_commit
from benchmarks.harness import machine, run
from benchmarks.harness.results import RESULTS
from benchmarks.report.pages import CODEGEN, write_pages
from benchmarks.report.tables import as_table
from benchmarks.suites.data import data
from benchmarks.suites.gpu.command import gpu
from benchmarks.suites.parity import parity
from emu3_kernels.ops import OPS

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Op = Annotated[list[str] | None, typer.Option(help="Op to time; all by default.")]
Load = Annotated[bool, typer.Option(help="Run on a busy machine: print, write nothing.")]
Threads = Annotated[list[int] | None, typer.Option(help="Thread counts; 1 and 2.")]
OneThreads = Annotated[list[int] | None, typer.Option(help="Thread counts; 2.")]
Seconds = Annotated[float, typer.Option(help="Limit of all rounds of a row.")]

TOKENS = 256
"""Per training step: 50 steps of 2048 tokens take nine minutes on two cores, of 256 two."""

SECONDS = 0.4
"""Limit of all rounds of a row in ``all``; ``MIN_ROUNDS`` are made anyway."""


@app.command()
def ops(
    op: Op = None, threads: Threads = None, seconds: Seconds = 2.0, allow_load: Load = False
) -> None:
    """Time the ops beside their peers and store the rows."""
    run.refuse(time_all(run.runs(known(op), threads, seconds), allow_load))


def known(op: list[str] | None) -> list[str]:
    chosen = op or list(OPS)
    if unknown := sorted(set(chosen) - set(OPS)):
        raise typer.BadParameter(f"--op must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    return chosen


def time_all(listed: list[run.Run], allow_load: bool) -> list[str]:
    show = lambda op, rows: run.console.print(as_table(op, rows))  # noqa: E731
    return run.time_all(listed, allow_load, show)


@app.command()
def compare(
    ref: Annotated[str, typer.Argument(help="Commit to compare with.")] = "HEAD",
    tree: Annotated[Path | None, typer.Option(help="A built tree, in place of REF.")] = None,
    op: Op = None,
    threads: Annotated[int | None, typer.Option(help="Threads; 2.")] = None,
    rounds: Annotated[int, typer.Option(help="Processes of each side.")] = 5,
    backend: Annotated[str | None, typer.Option(help="Backend; the default one.")] = None,
    allow_load: Annotated[bool, typer.Option(help="Run on a busy machine.")] = False,
) -> None:
    """Time the ops of the working tree against another commit, in alternating processes."""
    chosen = known(op)
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        run.refuse([reason])
    count = threads or min(2, machine.cores())
    other_commit.compare(ref, chosen, count, rounds, tree, backend)


@app.command()
def model(
    threads: OneThreads = None,
    seconds: Seconds = 60.0,
    steps: Annotated[int, typer.Option(help="Train so many steps too; compare losses.")] = 0,
    step_tokens: Annotated[int, typer.Option(help="Tokens of such a step.")] = TOKENS,
    allow_load: Load = False,
) -> None:
    """Time a training step (no optimizer) beside Hugging Face's Emu3 and store the rows."""
    need_transformers()
    run.refuse(time_all(model_runs(threads, seconds, steps, step_tokens), allow_load))


def need_transformers() -> None:
    if find_spec("transformers") is None:
        run.refuse(["transformers is not installed: pip install 'transformers>=5.23'"])


def model_runs(
    threads: list[int] | None, seconds: float, steps: int, step_tokens: int
) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    options = (f"--steps={steps}", f"--step-tokens={step_tokens}")
    return run.runs(["model"], counts, seconds, *options, scale=False)


@app.command()
def train(
    threads: OneThreads = None,
    seconds: Seconds = 60.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One small step of each entry: print, write nothing.")
    ] = False,
    allow_load: Load = False,
) -> None:
    """Time steps of the miniature's recipes, packed and padded, beside Hugging Face's Emu3."""
    need_transformers()
    if dry_run:
        run.console.print(import_module("benchmarks.suites.train").dry_run())
        return
    run.refuse(time_all(train_runs(threads, seconds), allow_load))


def train_runs(threads: list[int] | None, seconds: float) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    return run.runs(["train"], counts, seconds, scale=False)


@app.command()
def vision(threads: OneThreads = None, seconds: Seconds = 60.0, allow_load: Load = False) -> None:
    """Time an image encoded and decoded beside Hugging Face's tokenizer and store the rows."""
    need_transformers()
    run.refuse(time_all(vision_runs(threads, seconds), allow_load))


def vision_runs(threads: list[int] | None, seconds: float) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    return run.runs(["vision"], counts, seconds, scale=False)


@app.command()
def generate(threads: OneThreads = None, allow_load: Load = False) -> None:
    """Time a guided image beside Hugging Face's generate and store the row: some ten minutes."""
    need_transformers()
    run.refuse(time_all(generate_runs(threads), allow_load))


def generate_runs(threads: list[int] | None) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    return run.runs(["generate"], counts, 60.0, scale=False)


@app.command()
def weights(
    demo: Annotated[Path | None, typer.Option(help="Folder of emu3 demo, for errors.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; 2.")] = None,
    seconds: Seconds = 2.0,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = RESULTS,
    allow_load: Annotated[bool, typer.Option(help="Run on a busy machine.")] = False,
) -> None:
    """Time weights in 8 and 4 bits beside bfloat16, with what they cost, and write the page."""
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        run.refuse([reason])
    machine.prepare(threads or min(2, machine.cores()))
    suite = import_module("benchmarks.suites.weights")
    run.console.print(f"wrote {suite.write(out, suite.measure(demo, seconds))}")


@app.command(name="all")
def everything(allow_load: Load = False) -> None:
    """Time and count everything and write the pages.

    About 20 minutes on two quiet cores, 35 without AVX-512.
    """
    start, write = time.monotonic(), not allow_load
    if (reason := machine.why_not_publish(machine.load())) and write:
        run.refuse([reason])
    listed = run.runs(list(OPS), None, SECONDS)
    if find_spec("transformers"):
        listed += model_runs(None, SECONDS, steps=50, step_tokens=TOKENS)
        listed += train_runs(None, 30.0)
        listed += generate_runs(None)
        listed += vision_runs(None, 30.0)
    failures = time_all(listed, allow_load)
    if find_spec("triton"):
        run.progress(len(listed), len(listed), "machine code of the GPU kernels", start)
        failures += count_all(write)
    if write:
        report()
    run.progress(len(listed), len(listed), "done", start)
    run.refuse(failures)


def count_all(write: bool) -> list[str]:
    """Count the machine code of every kernel; return the broken contracts."""
    codegen = import_module("benchmarks.suites.codegen")
    rows = codegen.rows_beside(OPS, peers=find_spec("liger_kernel") is not None)
    if write:
        codegen.write(RESULTS / CODEGEN, rows)
    return [f"{r.op}, {r.kernel}, {r.target}: {line}" for r in rows for line in r.broken]


@app.command()
def report() -> None:
    """Write the pages of benchmarks/results and their charts from the stored rows."""
    run.console.print(f"wrote {write_pages(RESULTS)}")


if find_spec("triton"):
    app.command()(import_module("benchmarks.suites.codegen").codegen)
    app.command()(import_module("benchmarks.suites.host").host)
if find_spec("scenedetect"):
    app.command()(import_module("benchmarks.suites.curate").curate)
app.command()(data)
app.command()(parity)
app.command()(gpu)


def main() -> None:
    run.restart_with_allocator()
    app()


if __name__ == "__main__":
    main()
