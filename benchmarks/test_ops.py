"""One test, one row: an op of ours beside its peers and the bound, in interleaved rounds."""

from math import inf
from statistics import median

import pytest
import torch

from benchmarks import bounds, contestants, machine
from benchmarks.bounds import COPY, EMPTY, MULTIPLY, PRODUCTS, READ
from benchmarks.contestants import Case, Lineup
from benchmarks.duel import interleave, paired_ratio
from emu3_kernels.runtime import library

NOT_RIVALS = (READ, COPY, MULTIPLY, PRODUCTS, EMPTY)


def test_op(case: Case, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    asked, before = request.config.getoption, machine.load()
    few = threads < max(asked("--threads") or [1])
    with torch.set_grad_enabled(case.direction not in contestants.WITHOUT_GRADIENT):
        try:
            lineup = contestants.lineup(case, contestants.TOO_LONG if few else inf)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        calls, seconds = lineup.calls, asked("--seconds")
        taken = interleave(benchmark, calls, lineup.seconds, seconds, lineup.clock)
    loads = [before, machine.load()]
    bound = bounds.bound(case, taken)
    benchmark.extra_info.update(row(case, threads, loads, lineup, taken, bound))


def row(
    case: Case,
    threads: int,
    loads: list[float],
    lineup: Lineup,
    taken: dict[str, list[float]],
    bound: dict | None,
) -> dict:
    """Write down everything that was measured about ``case``."""
    ours = taken[case.backend]
    level = f"@{library.cpu_level()}" if case.backend == "cpu" and case.device == "cpu" else ""
    rivals = [name for name in taken if name not in (case.backend, *NOT_RIVALS)]

    def standing(name: str) -> dict:
        seconds = median(taken[name])
        return {
            "ms": 1e3 * seconds,
            **rates(bound, seconds),
            "of_bound": bound and bound["fraction"] / paired_ratio(taken[name], ours)["median"],
            "peak_mib": lineup.peak_mib[name],
        }

    return {
        "label": "MEASURED",
        "op": case.op,
        "backend": case.backend + level,
        "device": case.device,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "threads": threads,
        "load": loads,
        "rounds": len(ours),
        **standing(case.backend),
        **bounds.above_empty(ours, taken),
        "results_mib": lineup.results_mib,
        "bound": bound,
        "peers": {
            name: {**standing(name), "ratio": paired_ratio(taken[name], ours)} for name in rivals
        },
        "missing": lineup.missing,
    }


def rates(bound: dict | None, seconds: float) -> dict[str, float]:
    """Divide what is COUNTED by what was MEASURED."""
    bound = bound or {}
    rates = {"gb_s": bound.get("bytes", 0) / 1e9, "tflop_s": bound.get("flops", 0) / 1e12}
    return {name: amount / seconds for name, amount in rates.items() if amount}
