"""Seconds of a call, on any device."""

import time
from collections.abc import Callable

import torch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, its asynchronous work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
