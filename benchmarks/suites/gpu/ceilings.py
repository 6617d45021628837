"""What the GPU itself can do: bytes copied and read, GEMMs aligned and at Emu3's odd vocabulary."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from benchmarks.harness import clock
from benchmarks.harness.entries import Entries
from benchmarks.suites.gpu import rows
from benchmarks.suites.gpu.plan import CLASSES, Item

NUM_BYTES = {"cuda": 2 << 30, "cpu": 1 << 16}
ALIGNED = CLASSES // 128 * 128
"""Most classes of the vocabulary that fill whole tiles of a GEMM."""


def prepare(item: Item, device: str, skip: Mapping[str, str]) -> Iterator:
    yield {"default": "torch", "missing": dict(skip)}


def measure(item: Item, device: str, prepared: Mapping) -> Iterator:
    """Yield a row for each: copy, read, and every GEMM."""
    with rows.process_state(device), torch.no_grad():
        yield from _memory(item, device)
        side, is_tiny = item.size["side"], item.dry
        aligned, odd = (256, 250) if is_tiny else (ALIGNED, CLASSES)
        width = side // 2
        for m, k, n in (
            (side, side, side),
            (side, width, aligned),  # hidden @ head.T
            (side, width, odd),
            (side, odd, width),  # dlogits @ head
            (odd, side, width),  # dlogits.T @ hidden
        ):
            yield f"GEMM {m} x {k} x {n}"
            yield _gemm(item, device, m, k, n)


def _memory(item: Item, device: str) -> Iterator:
    source = torch.empty(NUM_BYTES[device] // 4, device=device).normal_()
    target = torch.empty_like(source)
    for name, call, times in (
        ("copy", partial(target.copy_, source), 2),
        ("read", source.sum, 1),
    ):
        yield name
        row = _row(item, device, name, {"bytes": times * source.nbytes}, torch.float32, call)
        yield row | {"gb_s": times * source.nbytes / row["ms"] / 1e6}


def _gemm(item: Item, device: str, m: int, k: int, n: int) -> dict:
    left = torch.randn(m, k, device=device, dtype=item.dtype)
    right = torch.randn(n, k, device=device, dtype=item.dtype)
    call = partial(torch.mm, left, right.T)
    row = _row(item, device, "GEMM", {"m": m, "k": k, "n": n}, item.dtype, call)
    return row | {"tflop_s": 2 * m * k * n / row["ms"] / 1e9}


def _row(
    item: Item, device: str, name: str, size: dict, dtype: torch.dtype, call: clock.Call
) -> dict:
    found = Entries(clock=clock.of(device))
    found.add("torch", call)
    case = rows.Case(name, "torch", size, dtype, "forward", device)
    return rows.timed_row(item, case, found, lambda case, taken: None)
