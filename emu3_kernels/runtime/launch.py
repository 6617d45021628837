"""Launches of Triton kernels: on which device, on how many multiprocessors, with which options."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is decorated; so do we, once, at import."""

DEVICES = {"cuda", "cpu"} if INTERPRETED else {"cuda"}
"""Types of the devices whose tensors a launch takes; a ROCm device is of type cuda too."""

gluon_devices = {"cuda"}
"""Likewise of Gluon, which Triton does not interpret: the emulator of the tests adds the CPU."""


class Gpu(NamedTuple):
    """What tiles and grids are chosen by."""

    warp_size: int
    num_sms: int
    capability: int = 0
    """Compute capability of an NVIDIA GPU, 90 for an H100 or H200; 0 of another GPU."""


_gpus: dict[int, Gpu] = {}
_assumed = Gpu(warp_size=32, num_sms=4)
"""Where no GPU runs a launch: interpreted, or recorded by the code-generation gate."""


def gpu_of(tensor: Tensor) -> Gpu:
    """Describe the device of ``tensor``, which is asked once."""
    if not tensor.is_cuda:
        return _assumed
    index = tensor.get_device()
    if index not in _gpus:
        properties = torch.cuda.get_device_properties(index)
        capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
        _gpus[index] = Gpu(properties.warp_size, properties.multi_processor_count, capability)
    return _gpus[index]


@contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Choose tiles and grids inside the block as for ``gpu``, on tensors that are on none."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before


def launch(kernel, grid: tuple[int, ...], first: Tensor, *args, **options) -> None:
    """Run ``kernel[grid](first, *args, **options)`` on the device of ``first``.

    By ``run``, to which ``kernel[grid]`` is two calls and a microsecond more.
    """
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel.run(first, *args, grid=grid, warmup=False, **options)
    else:
        kernel.run(first, *args, grid=grid, warmup=False, **options)


class LaunchPlan(NamedTuple):
    """What a launch takes beside its tensors: given by shapes, dtypes, settings and the GPU."""

    scalars: tuple[int | float, ...]
    """The arguments after the tensors."""
    options: dict[str, int | bool | tuple[int, ...]]
    """The grid, the kernel's constants and Triton's options."""


def plan_launch(grid: tuple[int, ...], *scalars: float, **options) -> LaunchPlan:
    return LaunchPlan(scalars, options | {"grid": grid, "warmup": False})


def launch_planned(kernel, plan: LaunchPlan, first: Tensor, *tensors: Tensor | None) -> None:
    """As :func:`launch`, by a plan: a microsecond less, and what computing the plan takes."""
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel.run(first, *tensors, *plan.scalars, **plan.options)
    else:
        kernel.run(first, *tensors, *plan.scalars, **plan.options)


def planned(plan: Callable) -> Callable:
    """Keep what ``plan`` returns for hashable arguments; torch.compile traces it every time."""
    kept = lru_cache(maxsize=1024, typed=True)(plan)  # of 1 and 1.0 the arguments differ

    @wraps(plan)
    def wrapper(*args):
        return plan(*args) if torch.compiler.is_compiling() else kept(*args)

    return wrapper


def why_not_triton(tensor: Tensor) -> str | None:
    """Say why a Triton kernel cannot run on ``tensor``; None if it can."""
    if not tensor.is_cuda and not (tensor.is_cpu and "cpu" in DEVICES):
        return f"Triton has no {tensor.device.type} target here"
    dtype = tensor.dtype
    if dtype == torch.float64:
        return "float64 is left to the reference"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16 (ttsem tests it instead)"
    return None


def cdiv(a: int, b: int) -> int:
    """Divide and round up. Triton's own takes 2.7 microseconds from the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(num_warps: int, num_stages: int = 1, **blocks: int) -> dict[str, int | bool]:
    """Return the options of a launch: block sizes by the names of the kernel's constants.

    FP fusion is among them since Triton 3.10 flips its default.
    """
    return blocks | {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
