"""The bound: a time that no implementation can beat, measured in the same rounds as the op.

For an op bound by memory, the time to read or copy as many bytes in huge pages. For an op bound by
GEMMs, the time of as many FLOPs at the rate of one large GEMM. ``cases.py`` states bytes and FLOPs.
"""

from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.clock import Call
from benchmarks.harness.interleave import paired_ratio
from benchmarks.peers.cpu import IN_PLACE
from emu3_kernels.runtime import library
from emu3_kernels.runtime.library import advise_huge_pages
from emu3_kernels.testing.suite import cases

READ, COPY, GEMM = "bound: read", "bound: copy", "bound: GEMM"
GEMMS = "bound: GEMMs"
"""All GEMMs of a training step."""
EMPTY = "an empty native call"
"""A call on tensors without rows: the cost of a call that computes nothing."""
SMALL = 1 << 20
"""Bytes up to which the cost of the call itself matters: a decoded token, not a prompt."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""M = N = K of the GEMM that measures the rate of a device."""

COUNTED_BY = {
    "forward": "bytes_moved",
    IN_PLACE: "bytes_moved",
    "backward": "backward_bytes",
    "forward+backward": "training_bytes",
}
"""The field of ``Cases`` that counts the bytes of a direction; without it there is no bound."""
NUM_GEMMS = {"backward": 2, "forward+backward": 3}
"""The gradients of a GEMM take two more of the same size."""


def calls(case: Any) -> dict[str, Call]:
    """Read and copy as many bytes as ``case`` must move, or run a GEMM if it counts FLOPs alone."""
    if num_bytes := bytes_moved(case):
        source, half, copied = (
            advise_huge_pages(torch.empty(num_bytes // n, device=case.device)).uniform_()
            for n in (4, 8, 8)
        )
        moved = {READ: source.sum, COPY: partial(copied.copy_, half)}
        return moved | (empty_call(case) if num_bytes <= SMALL else {})
    return {GEMM: gemm(case.dtype, case.device)} if flops(case) else {}


def empty_call(case: Any) -> dict[str, Call]:
    if library.MISSING or case.device != "cpu" or case.direction != "forward":
        return {}
    no_rows, weight = torch.empty(0, 8), torch.empty(8)
    return {EMPTY: partial(torch.ops.emu3_kernels.rms_norm_forward, no_rows, weight, 1e-5)}


def above_empty(ours: list[float], taken: dict[str, list[float]]) -> dict[str, float]:
    """Return the microseconds that ours takes above an empty call, if one was timed."""
    if EMPTY not in taken:
        return {}
    more = [our - empty for our, empty in zip(ours, taken[EMPTY], strict=True)]
    return {"above_empty_us": 1e6 * median(more)}


def gemm(dtype: torch.dtype, device: str) -> Call:
    """Run a GEMM in ``dtype``, or in float32 where that is faster."""
    (fast,) = machine.gemm_dtypes([dtype], device)
    left, right = (torch.randn(2 * [MATRIX[device]], device=device).to(fast) for _ in range(2))
    return partial(torch.mm, left, right)


def bytes_moved(case: Any) -> int | None:
    """Count the bytes that ``case`` must move, if its op states them for the direction."""
    counted = getattr(cases(case.op), COUNTED_BY[case.direction])
    return counted and counted(**case.size, dtype=case.dtype)


def flops(case: Any) -> int | None:
    """Count the FLOPs of an op that is bound by GEMMs and states no bytes."""
    stated = cases(case.op)
    if stated.bytes_moved or not stated.flops:
        return None
    return NUM_GEMMS.get(case.direction, 1) * stated.flops(**case.size, dtype=case.dtype)


def bound(case: Any, taken: dict[str, list[float]]) -> dict[str, Any] | None:
    """Return the bound of ``case`` and its share of our time; None if it has none."""
    ours = taken[case.backend]
    if READ in taken:
        num_bytes = bytes_moved(case)
        fastest = min((READ, COPY), key=lambda name: median(taken[name]))
        return {
            "label": "BOUND",
            "bytes": num_bytes,
            "read_gb_s": num_bytes / median(taken[READ]) / 1e9,
            "copy_gb_s": num_bytes / median(taken[COPY]) / 1e9,
            "ms": 1e3 * median(taken[fastest]),
            "fraction": paired_ratio(taken[fastest], ours)["median"],
        }
    if GEMM in taken:
        return of_gemm(flops(case), MATRIX[case.device], ours, taken[GEMM])
    return None


def of_gemm(num_flops: int, size: int, ours: list[float], gemm: list[float]) -> dict:
    """Compare ours with as many FLOPs at the rate of a GEMM of M = N = K = ``size``."""
    calibration = 2 * size**3
    scale = num_flops / calibration
    return {
        "label": "BOUND",
        "flops": num_flops,
        "gemm_tflop_s": calibration / median(gemm) / 1e12,
        "ms": 1e3 * scale * median(gemm),
        "fraction": scale * paired_ratio(gemm, ours)["median"],
    }
