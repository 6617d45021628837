"""One test, one row: an op of ours beside its peers and the bound, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks import contestants, machine
from benchmarks.contestants import COPY, READ, Case, Lineup
from benchmarks.duel import interleave, paired_ratio
from emu3_kernels import _native
from tests.kernels.suite import part


def test_op(case: Case, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    before = machine.load()
    with torch.set_grad_enabled(case.direction != "forward"):
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
    rivals = [name for name in taken if name not in (case.backend, READ, COPY)]
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
        "bound": bound(case, taken) if READ in taken else None,
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


def bound(case: Case, taken: dict[str, list[float]]) -> dict:
    """Set ours against the faster way to move the bytes that it must move, same rounds."""
    num_bytes = part(case.op, "cases").bytes_moved(**case.size, dtype=case.dtype)
    fastest = min((READ, COPY), key=lambda name: median(taken[name]))
    return {
        "label": "BOUND",
        "bytes": num_bytes,
        "gb_s": num_bytes / median(taken[case.backend]) / 1e9,
        "read_gb_s": num_bytes / median(taken[READ]) / 1e9,
        "copy_gb_s": num_bytes / median(taken[COPY]) / 1e9,
        "fraction": paired_ratio(taken[fastest], taken[case.backend])["median"],
    }
