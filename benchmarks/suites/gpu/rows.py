"""What the rows of a visit share: the state of the process, the rounds, kernel and host time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch._functorch.config
import torch._inductor.config

from benchmarks.harness import apart, bounds, entries, machine
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.interleave import time_rounds
from benchmarks.harness.rows import NOT_PEERS, row_of
from benchmarks.harness.worker import first_line, gpu_is_lost
from benchmarks.suites.gpu.plan import Item

ENTRY = "entry "
"""Prefix of the steps of a job that may be left out where one kills the process."""


@contextmanager
def process_state(device: str) -> Iterator[None]:
    """Work on a stream that a CUDA graph can capture, float32 without TF32; free memory after."""
    if device == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            torch._inductor.config.patch(compile_threads=1),
            # A backward pass is timed more than once: it may not overwrite what forward saved.
            torch._functorch.config.patch(donated_buffer=False),
        ):
            yield
    finally:
        entries.forget_inputs()
        with suppress(RuntimeError):  # of a GPU that is lost; the job's own error says so
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def case_of(item: Item, backend: str, direction: str, device: str) -> Case:
    return Case(item.op, backend, dict(item.size), item.dtype, direction, device)


def timed_row(item: Item, case: Case, found: Entries, bound_of=bounds.bound) -> dict:
    """Time the entries in interleaved rounds; return the row."""
    found.estimate()
    before = machine.load()
    gc.disable()
    try:
        taken = time_rounds(found.calls, found.seconds, item.seconds, found.clock)
    finally:
        gc.enable()
    loads = [before, machine.load()]
    row = row_of(case, None, loads, found, taken, bound_of(case, taken))
    return row | {"label": "DRY RUN" if item.dry else "MEASURED"}


def add_kernel_and_host_time(row: dict, found: Entries, device: str) -> Iterator[str]:
    """Add ``graph_ms`` and ``host_us`` of every entry; yield a step for each."""
    standings = {row["backend"].partition("@")[0]: row, **row["peers"]}
    for name, call in found.calls.items():
        if name in NOT_PEERS or name not in standings:
            continue
        yield f"{name} in a CUDA graph"
        standing = standings[name]
        standing["host_us"] = 1e6 * apart.host_seconds(call, device)
        if device != "cuda":
            continue
        try:
            standing["graph_ms"] = 1e3 * apart.graph_seconds(call, found.clock)
        except Exception as error:  # a call that cannot be captured is a result
            if gpu_is_lost():
                raise
            row["missing"][f"{name} in a CUDA graph"] = first_line(error)
