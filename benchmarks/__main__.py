"""Front door: ``python -m benchmarks COMMAND``, from the root."""

import time
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from benchmarks import base as other_commit
from benchmarks import machine, run
from benchmarks.report import CODEGEN, RESULTS, write_pages
from emu3_kernels.ops import OPS

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Load = Annotated[bool, typer.Option(help="Time on a busy machine: print, and never write.")]
Threads = Annotated[list[int] | None, typer.Option(help="Thread counts; 1 and 2.")]
TOKENS = 256
"""Of a step of training: 50 steps of 2048 tokens take nine minutes on two cores, of 256 two."""

SECONDS = 0.4
"""Of all rounds of a row when everything is timed; at least ``duel.MIN_ROUNDS`` are made."""


@app.command()
def ops(
    op: Annotated[list[str] | None, typer.Option(help="Op to time; all by default.")] = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="All rounds of a row may take this long.")] = 2.0,
    base: Annotated[str | None, typer.Option(help="Time against this commit, and print.")] = None,
    rounds: Annotated[int, typer.Option(help="Processes of each side, with --base.")] = 5,
    allow_load: Load = False,
) -> None:
    """Time the ops beside their peers and write benchmarks/results."""
    chosen = op or list(OPS)
    if unknown := sorted(set(chosen) - set(OPS)):
        raise typer.BadParameter(f"--op must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    if base is None:
        run.refuse(run.time_all(run.runs(chosen, threads, seconds), allow_load))
        return
    if (reason := machine.why_not_publish(machine.load())) and not allow_load:
        run.refuse([reason])
    other_commit.compare(base, chosen, max(threads or [min(2, machine.cores())]), rounds)


@app.command()
def model(
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; 2.")] = None,
    seconds: Annotated[float, typer.Option(help="All rounds of a row may take this long.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Train so long too, and compare the losses.")] = 0,
    step_tokens: Annotated[int, typer.Option(help="Tokens of such a step.")] = TOKENS,
    allow_load: Load = False,
) -> None:
    """Time a training step (no optimizer) beside Hugging Face's Emu3 and write results."""
    need_transformers()
    listed = steps_of_model(threads, seconds, steps, step_tokens)
    run.refuse(run.time_all(listed, allow_load))


def need_transformers() -> None:
    if find_spec("transformers") is None:
        run.refuse(["transformers is not installed: pip install 'transformers>=5.23'"])


def steps_of_model(
    threads: list[int] | None, seconds: float, steps: int, step_tokens: int
) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    options = (f"--steps={steps}", f"--step-tokens={step_tokens}")
    return run.runs(["model"], counts, seconds, *options, scale=False)


@app.command()
def vision(
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; 2.")] = None,
    seconds: Annotated[float, typer.Option(help="All rounds of a row may take this long.")] = 60.0,
    allow_load: Load = False,
) -> None:
    """Time a picture encoded and decoded beside Hugging Face's tokenizer and write results."""
    need_transformers()
    run.refuse(run.time_all(pictures(threads, seconds), allow_load))


def pictures(threads: list[int] | None, seconds: float) -> list[run.Run]:
    counts = threads or [min(2, machine.cores())]
    return run.runs(["vision"], counts, seconds, scale=False)


@app.command(name="all")
def everything(allow_load: Load = False) -> None:
    """Time and count everything and write the report.

    Some 20 minutes on two quiet cores, 35 without AVX-512.
    """
    start, write = time.monotonic(), not allow_load
    if (reason := machine.why_not_publish(machine.load())) and write:
        run.refuse([reason])
    listed = run.runs(list(OPS), None, SECONDS)
    if find_spec("transformers"):
        listed += steps_of_model(None, SECONDS, steps=50, step_tokens=TOKENS)
        listed += pictures(None, 30.0)
    failures = run.time_all(listed, allow_load)
    if find_spec("triton"):
        run.progress(len(listed), len(listed), "machine code of the GPU kernels", start)
        failures += count_all(write)
    if write:
        report()
    run.progress(len(listed), len(listed), "done", start)
    run.refuse(failures)


def count_all(write: bool) -> list[str]:
    """Count what the compiler makes of every kernel; return the contracts that are broken."""
    codegen = import_module("benchmarks.codegen")
    rows = codegen.rows_beside(OPS, peers=find_spec("liger_kernel") is not None)
    if write:
        codegen.write(RESULTS / CODEGEN, rows)
    return [f"{r.op}, {r.kernel}, {r.target}: {line}" for r in rows for line in r.broken]


@app.command()
def report() -> None:
    """Write the pages of benchmarks/results and their charts from the JSON files there."""
    run.console.print(f"wrote {write_pages(RESULTS)}")


if find_spec("triton"):
    app.command()(import_module("benchmarks.codegen").codegen)


def main() -> None:
    run.start_again_alike()
    app()


if __name__ == "__main__":
    main()
