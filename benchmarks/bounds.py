"""The time that no implementation can beat, measured beside the op in the same rounds.

An op that moves bytes is set against reading, or copying, as many in large pages; one that
multiplies matrices against multiplying one pair of matrices as often as its FLOPs ask. Bytes and
FLOPs are COUNTED: ``cases.py`` states them, the times are MEASURED, and what follows from both is
the BOUND.
"""

from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.clock import Call
from benchmarks.duel import paired_ratio
from benchmarks.peers import IN_PLACE
from emu3_kernels import in_large_pages
from emu3_kernels.runtime import library
from emu3_kernels.runtime.gemm import is_slow
from emu3_kernels.testing.suite import part

READ, COPY, MULTIPLY = "bound: read", "bound: copy", "bound: multiply"
PRODUCTS = "bound: products"
"""All matrix products of a step of training."""
EMPTY = "an empty native call"
"""On tensors of no rows: what a call costs that computes nothing."""
SMALL = 1 << 20
"""Bytes up to which the call itself counts: those of a decoded token, not of a prompt."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product is the measure of a device."""

COUNTED_BY = {
    "forward": "bytes_moved",
    IN_PLACE: "bytes_moved",
    "backward": "backward_bytes",
    "forward+backward": "training_bytes",
}
"""Which function of ``cases.py`` counts the bytes of a direction; without it there is no bound."""
NUM_PRODUCTS = {"backward": 2, "forward+backward": 3}
"""The gradients of a product take two more of the same size."""


def calls(case: Any) -> dict[str, Call]:
    """Read, and copy, as many bytes as ``case`` must move; or multiply, if it counts FLOPs only."""
    if num_bytes := bytes_moved(case):
        source, half, copied = (
            in_large_pages(torch.empty(num_bytes // n, device=case.device)).uniform_()
            for n in (4, 8, 8)
        )
        moved = {READ: source.sum, COPY: partial(copied.copy_, half)}
        return moved | (empty_call(case) if num_bytes <= SMALL else {})
    return {MULTIPLY: multiply(case.dtype, case.device)} if flops(case) else {}


def empty_call(case: Any) -> dict[str, Call]:
    if library.MISSING or case.device != "cpu" or case.direction != "forward":
        return {}
    no_rows, weight = torch.empty(0, 8), torch.empty(8)
    return {EMPTY: partial(torch.ops.emu3_kernels.rms_norm_forward, no_rows, weight, 1e-5)}


def above_empty(ours: list[float], taken: dict[str, list[float]]) -> dict[str, float]:
    """Say how many microseconds ours takes more than an empty call, if that was timed too."""
    if EMPTY not in taken:
        return {}
    more = [our - empty for our, empty in zip(ours, taken[EMPTY], strict=True)]
    return {"above_empty_us": 1e6 * median(more)}


def multiply(dtype: torch.dtype, device: str) -> Call:
    """Multiply in ``dtype``, or in float32 where that is faster."""
    left, right = (torch.randn(2 * [MATRIX[device]], device=device).to(dtype) for _ in range(2))
    if is_slow(left):
        left, right = left.float(), right.float()
    return partial(torch.mm, left, right)


def bytes_moved(case: Any) -> int | None:
    """Count the bytes that ``case`` must move, where its op states them for the direction."""
    counted = getattr(part(case.op, "cases"), COUNTED_BY[case.direction], None)
    return counted and counted(**case.size, dtype=case.dtype)


def flops(case: Any) -> int | None:
    """Count the FLOPs of an op that is made of products and states no bytes."""
    stated = part(case.op, "cases")
    if hasattr(stated, "bytes_moved") or not hasattr(stated, "flops"):
        return None
    return NUM_PRODUCTS.get(case.direction, 1) * stated.flops(**case.size, dtype=case.dtype)


def bound(case: Any, taken: dict[str, list[float]]) -> dict[str, Any] | None:
    """Return the bound of ``case`` and what share of our time it is; None if it has none."""
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
    if MULTIPLY in taken:
        return of_product(flops(case), MATRIX[case.device], ours, taken[MULTIPLY])
    return None


def of_product(num_flops: int, width: int, ours: list[float], product: list[float]) -> dict:
    """Set ours against products of the same FLOPs at the rate of one of ``width`` rows."""
    calibration = 2 * width**3
    scale = num_flops / calibration
    return {
        "label": "BOUND",
        "flops": num_flops,
        "multiply_tflop_s": calibration / median(product) / 1e12,
        "ms": 1e3 * scale * median(product),
        "fraction": scale * paired_ratio(product, ours)["median"],
    }
