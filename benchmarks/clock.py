"""The two clocks: seconds of this processor, and seconds of a GPU between two events on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

PAUSE = 5e-3
"""Seconds of rest before a sample: an OpenMP pool spins that long after its last region, and a
contestant with a pool of its own would share the cores with it."""

FLUSHED = 512 << 20
"""Bytes that are written between samples on a GPU, more than any of its caches holds."""


class Mark:
    """A point in the work of a GPU; a later one less an earlier one is the seconds between."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Mark") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class Clock:
    """How calls on one kind of device are timed, and how their memory is seen."""

    timer: Callable
    """Read at both ends of a sample; pytest-benchmark takes the difference."""
    min_sample: float
    """Seconds that one sample lasts at least: short calls are repeated, so that it is exact."""
    rest: Callable[[], None]
    """What happens before a sample."""
    peak: Callable[[Call], tuple[object, float]]
    """Call once: the result, and the bytes that torch's allocator held at the peak."""

    @property
    def name(self) -> str:
        """Return the timer as pytest-benchmark's option wants it."""
        return f"{self.timer.__module__}.{self.timer.__qualname__}"

    def seconds(self, call: Call, times: int) -> float:
        start = self.timer()
        for _ in range(times):
            call()
        return self.timer() - start


def of(device: str) -> Clock:
    return EVENTS if device == "cuda" else WALL


def flush() -> None:
    """Empty a GPU's cache; while it still writes, the call that is timed next is being launched."""
    torch.empty(FLUSHED, dtype=torch.int8, device="cuda").zero_()


def peak_of_profile(call: Call) -> tuple[object, float]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return result, peak


def peak_of_gpu(call: Call) -> tuple[object, float]:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


WALL = Clock(time.perf_counter, 2e-3, lambda: time.sleep(PAUSE), peak_of_profile)
# An event is exact to half a microsecond, and the cache is cold for one call only.
EVENTS = Clock(Mark, 0.0, flush, peak_of_gpu)
