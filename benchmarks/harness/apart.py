"""Kernel time and host time of a call, apart, and the kernels that it launches.

A call in a CUDA graph has no host time. The host time is that of a call that nothing waits for.
"""

import time
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.clock import Call, Clock

GRAPH_SAMPLES, HOST_SAMPLES = 10, {"cuda": 20, "cpu": 3}
NUM_KERNELS = 25
"""Kernels of a table, the longest ones; the rest is one line."""


def graph_seconds(call: Call, clock: Clock) -> float:
    """Return the median seconds of a replay, with the cache flushed.

    The caller's stream must not be the default one, and must be that of an earlier forward pass.

    Raises:
        RuntimeError: the call cannot be captured, for example since it waits for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    graph.replay()
    samples = []
    for _ in range(GRAPH_SAMPLES):
        clock.rest()
        samples.append(clock.seconds(graph.replay, 1))
    return median(samples)


def host_seconds(call: Call, device: str) -> float:
    """Return the median seconds until ``call`` returns, on an idle device."""
    samples = []
    for _ in range(HOST_SAMPLES[device]):
        synchronize(device)
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    synchronize(device)
    return median(samples)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(call: Call, device: str) -> list[dict]:
    """Return name, number of launches and milliseconds of every kernel, the longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity]) as profiled:
        call()
        synchronize(device)
    of_device = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [
        {"kernel": event.key, "launches": event.count, "ms": getattr(event, time_of) / 1e3}
        for event in profiled.key_averages()
        if event.device_type == of_device and getattr(event, time_of) > 0
    ]
    found.sort(key=lambda kernel: -kernel["ms"])
    shown, rest = found[:NUM_KERNELS], found[NUM_KERNELS:]
    if rest:
        sums = {key: sum(kernel[key] for kernel in rest) for key in ("launches", "ms")}
        shown.append({"kernel": f"{len(rest)} others"} | sums)
    return shown
