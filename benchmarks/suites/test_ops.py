"""One test, one row: an op of ours beside its peers and the bound, in interleaved rounds."""

from math import inf

import pytest
import torch

from benchmarks.harness import bounds, entries, machine
from benchmarks.harness.calls import WITHOUT_GRADIENT
from benchmarks.harness.entries import TOO_LONG, Case
from benchmarks.harness.interleave import interleave
from benchmarks.harness.rows import row_of


def test_op(case: Case, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    option, before = request.config.getoption, machine.load()
    few = threads < max(option("--threads") or [1])
    with torch.set_grad_enabled(case.direction not in WITHOUT_GRADIENT):
        try:
            timed = entries.entries_of(case, TOO_LONG if few else inf)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        seconds = option("--seconds")
        taken = interleave(benchmark, timed.calls, timed.seconds, seconds, timed.clock)
    loads = [before, machine.load()]
    bound = bounds.bound(case, taken)
    benchmark.extra_info.update(row_of(case, threads, loads, timed, taken, bound))
