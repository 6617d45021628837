"""One test, one row: an op as this tree computes it, alone; ``ops --base`` runs it in two trees."""

from statistics import median

import pytest
import torch

from benchmarks import contestants
from benchmarks.contestants import Case
from benchmarks.duel import interleave


def test_base(case: Case, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    with torch.set_grad_enabled(case.direction not in contestants.WITHOUT_GRADIENT):
        try:
            lineup = contestants.alone(case)
        except (NotImplementedError, TypeError) as reason:  # another commit may know fewer settings
            pytest.skip(str(reason))
        seconds = request.config.getoption("--seconds")
        taken = interleave(benchmark, lineup.calls, lineup.seconds, seconds, lineup.clock)
    benchmark.extra_info.update(row=str(case), ms=1e3 * median(taken[case.backend]))
