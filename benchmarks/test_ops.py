"""One test, one row: an op of ours beside its peers and the bound, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks import contestants, machine
from benchmarks.contestants import COPY, MATRIX, MULTIPLY, READ, Case, Lineup
from benchmarks.duel import interleave, paired_ratio
from emu3_kernels import _native


def test_op(case: Case, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    before = machine.load()
    with torch.set_grad_enabled(case.direction not in contestants.WITHOUT_GRADIENT):
        try:
            lineup = contestants.lineup(case)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        taken = interleave(
            benchmark, lineup.calls, lineup.seconds, request.config.getoption("--seconds")
        )
    loads = [before, machine.load()]
    benchmark.extra_info.update(row(case, threads, loads, lineup, taken))


def row(
    case: Case, threads: int, loads: list[float], lineup: Lineup, taken: dict[str, list[float]]
) -> dict:
    """Write down everything that was measured about ``case``."""
    ours = taken[case.backend]
    level = f"@{_native.cpu_level()}" if case.backend == "native" else ""
    rivals = [name for name in taken if name not in (case.backend, READ, COPY, MULTIPLY)]
    return {
        "label": "MEASURED",
        "op": case.op,
        "backend": case.backend + level,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "threads": threads,
        "load": loads,
        "rounds": len(ours),
        "ms": 1e3 * median(ours),
        "peak_mib": lineup.peak_mib[case.backend],
        "bound": bound(case, taken),
        "peers": {
            name: {
                "ms": 1e3 * median(taken[name]),
                "ratio": paired_ratio(taken[name], ours),
                "peak_mib": lineup.peak_mib[name],
            }
            for name in rivals
        },
        "missing": lineup.missing,
    }


def bound(case: Case, taken: dict[str, list[float]]) -> dict | None:
    """Set ours against the fastest way to do what it must do at least, in the same rounds."""
    ours = taken[case.backend]
    if READ in taken:
        num_bytes = contestants.bytes_moved(case)
        fastest = min((READ, COPY), key=lambda name: median(taken[name]))
        return {
            "label": "BOUND",
            "bytes": num_bytes,
            "gb_s": num_bytes / median(ours) / 1e9,
            "read_gb_s": num_bytes / median(taken[READ]) / 1e9,
            "copy_gb_s": num_bytes / median(taken[COPY]) / 1e9,
            "fraction": paired_ratio(taken[fastest], ours)["median"],
        }
    if MULTIPLY in taken:
        flops, calibration = contestants.flops(case), 2 * MATRIX**3
        return {
            "label": "BOUND",
            "flops": flops,
            "tflop_s": flops / median(ours) / 1e12,
            "multiply_tflop_s": calibration / median(taken[MULTIPLY]) / 1e12,
            "fraction": flops / calibration * paired_ratio(taken[MULTIPLY], ours)["median"],
        }
    return None
