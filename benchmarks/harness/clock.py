"""Two clocks: wall time on a CPU, and CUDA events on a GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

PAUSE = 5e-3
"""Seconds of rest before a sample: an OpenMP pool spins that long after its last region, and an
entry with its own pool would share the cores with it."""

FLUSHED = 512 << 20
"""Bytes written between samples on a GPU: more than any of its caches holds."""


class Mark:
    """A point in the work of a GPU; the difference of two is the seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Mark") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class Clock:
    """How calls on one kind of device are timed, and how their peak memory is measured."""

    timer: Callable
    """Called at both ends of a sample; pytest-benchmark takes the difference."""
    min_sample: float
    """Least seconds of one sample: short calls are repeated to fill it."""
    rest: Callable[[], None]
    """Called before a sample."""
    peak: Callable[[Call], tuple[object, float]]
    """Calls once; returns the result and the peak bytes of torch's allocator."""

    @property
    def name(self) -> str:
        """Return the timer as pytest-benchmark's option takes it."""
        return f"{self.timer.__module__}.{self.timer.__qualname__}"

    def seconds(self, call: Call, times: int) -> float:
        start = self.timer()
        for _ in range(times):
            call()
        return self.timer() - start


def of(device: str) -> Clock:
    return EVENTS if device == "cuda" else WALL


def flush() -> None:
    """Flush a GPU's cache; the next call is launched while the flush still runs."""
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
# An event is exact to half a microsecond, and the cache is cold for one call alone.
EVENTS = Clock(Mark, 0.0, flush, peak_of_gpu)
