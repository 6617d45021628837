"""Host time: the Python time of one call of the Triton backend, without a GPU.

Every Triton launch is recorded and not made, so that what remains is the host code of the op.
Results are undefined. The time is that of this process, not of others; the number of function
calls, Python's and C's, does not depend on the machine. A backward pass is timed with
``torch.autograd.grad``, and beside it what that takes where there is nothing to compute.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.harness import calls, machine, results, run
from benchmarks.report import tables
from emu3_kernels.ops import OPS
from emu3_kernels.testing import suite
from emu3_kernels.testing.launches import function_calls, recorded_launches

BACKEND = "triton"
SAMPLES, SAMPLE_SECONDS = 9, 0.02


def host(
    op: Annotated[list[str] | None, typer.Option(help="Op to time; all by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the floating inputs.")] = "bfloat16",
    write: Annotated[bool, typer.Option(help="Store the rows of this machine.")] = False,
) -> None:
    """Time the Python code of one call of each op, without a GPU."""
    if write and (reason := machine.why_not_publish(machine.load())):
        run.refuse([reason])
    torch.set_num_threads(1)
    rows = [row for name in op or OPS for row in rows_of_op(name, getattr(torch, dtype))]
    run.console.print(table(rows))
    if write:
        path = results.store(results.RESULTS / f"{machine.kind()}.jsonl", rows)
        run.console.print(f"wrote {len(rows)} rows to {path}")


def rows_of_op(op: str, dtype: torch.dtype) -> list[dict]:
    """Time forward, and backward if there is one; no row for an op without a Triton backend."""
    if isinstance(suite.backends_of(op).get(BACKEND, ""), str):
        return []
    stated = suite.cases(op)
    smallest = stated.decode[0] if stated.decode else stated.check[-1]
    rows = [row_of(op, smallest, dtype, "forward")]
    sample = stated.make(**stated.check[-1], dtype=dtype, device="cpu")
    if suite.differentiable(op, sample):
        rows += [row_of(op, stated.check[-1], dtype, way) for way in ("forward, grad", "backward")]
    return rows


def row_of(op: str, size: dict, dtype: torch.dtype, direction: str) -> dict:
    inputs = suite.cases(op).make(**size, dtype=dtype, device="cpu")
    leaves, empty = suite.differentiable(op, inputs), []
    function = lambda **given: suite.public(op)(**given, backend=BACKEND)  # noqa: E731
    with recorded_launches() as launches, torch.set_grad_enabled(direction != "forward"):
        if direction == "forward, grad":
            inputs = inputs | {name: inputs[name].requires_grad_() for name in leaves}
        way = "backward" if direction == "backward" else "forward"
        call = calls.bind(function, inputs, way, leaves)
        call()
        launches.clear()
        call()
        count = len(launches)
        num_calls = function_calls(call)
        seconds = samples(call)
        if direction == "backward":
            empty = samples(calls.bind(nothing_like(function, inputs, leaves), inputs, way, leaves))
    return {
        "label": "MEASURED",
        "suite": "host",
        "op": op,
        "backend": BACKEND,
        "device": "cpu",
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "threads": 1,
        "load": [machine.load()],
        "ms": 1e3 * median(seconds),
        "range_ms": [1e3 * min(seconds), 1e3 * max(seconds)],
        **({"empty_ms": 1e3 * median(empty)} if empty else {}),
        "calls": num_calls,
        "launches": count,
        "peers": {},
        "missing": {},
        **results.made_by(machine.facts(), (commit := machine.commit()), commit["time"]),
    }


class _Nothing(torch.autograd.Function):
    """Returns ``results``, and in the backward pass the leaves for their gradients."""

    @staticmethod
    def forward(ctx, results, *leaves):
        ctx.leaves = [leaf.detach() for leaf in leaves]
        return tuple(results)

    @staticmethod
    def backward(ctx, *douts):
        return None, *ctx.leaves


def nothing_like(function: Callable, inputs: dict, leaves: Sequence[str]) -> Callable:
    """Return a function of the results and the gradients of ``function`` that computes neither."""
    given = inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}
    results = [r.detach() for r in calls.as_tuple(function(**given)) if r.requires_grad]
    return lambda **given: _Nothing.apply(results, *(given[name] for name in leaves))


def samples(call: Callable[[], object]) -> list[float]:
    """Return seconds of this process per call, of ``SAMPLES`` samples."""
    start = time.process_time()
    call()
    repeats = max(1, round(SAMPLE_SECONDS / (time.process_time() - start)))
    taken = []
    for _ in range(SAMPLES):
        start = time.process_time()
        for _ in range(repeats):
            call()
        taken.append((time.process_time() - start) / repeats)
    return taken


def table(rows: list[dict]) -> Table:
    shown = Table(title="MEASURED: Python time of one call; launches recorded, not made")
    for index, column in enumerate(tables.HOST_HEADER):
        shown.add_column(column, justify="left" if index < 4 else "right")
    for row in rows:
        shown.add_row(*tables.host_line(row))
    return shown
