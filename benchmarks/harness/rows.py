"""One row of results: everything measured about one case."""

from collections.abc import Mapping
from statistics import median

from benchmarks.harness import bounds
from benchmarks.harness.bounds import COPY, EMPTY, GEMM, GEMMS, READ
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.interleave import paired_ratio
from emu3_kernels.runtime import library

NOT_PEERS = (READ, COPY, GEMM, GEMMS, EMPTY)

Taken = Mapping[str, list[float]]
"""Seconds per call of every entry, one number per round."""


def row_of(
    case: Case, threads: int, loads: list[float], entries: Entries, taken: Taken, bound: dict | None
) -> dict:
    """Return the row of ``case``; ``loads`` are the load averages before and after."""
    ours = taken[case.backend]
    level = f"@{library.cpu_level()}" if case.backend == "cpu" and case.device == "cpu" else ""

    def standing(name: str) -> dict:
        seconds = median(taken[name])
        return {
            "ms": 1e3 * seconds,
            **rates(bound, seconds),
            "of_bound": bound and bound["fraction"] / paired_ratio(taken[name], ours)["median"],
            "peak_mib": entries.peak_mib[name],
        }

    peers = [name for name in taken if name not in (case.backend, *NOT_PEERS)]
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
        "range_ms": [1e3 * min(ours), 1e3 * max(ours)],
        **bounds.above_empty(ours, taken),
        "results_mib": entries.results_mib,
        "bound": bound,
        "peers": {
            name: {**standing(name), "ratio": paired_ratio(taken[name], ours)} for name in peers
        },
        "missing": entries.missing,
    }


def rates(bound: dict | None, seconds: float) -> dict[str, float]:
    """Divide the COUNTED bytes and FLOPs by MEASURED seconds."""
    bound = bound or {}
    rates = {"gb_s": bound.get("bytes", 0) / 1e9, "tflop_s": bound.get("flops", 0) / 1e12}
    return {name: amount / seconds for name, amount in rates.items() if amount}
