"""Launches of GPU kernels, counted without a GPU."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from emu3_kernels.runtime import launch as launching
from emu3_kernels.testing.chips import CHIPS

H100 = CHIPS["sm_90"].gpu
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "_reshape_alias", "detach"}
"""Besides those whose schema says so."""
NO_KERNEL = ALLOCATIONS | VIEWS | {"promote_types"}


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Record the name of every Triton launch inside the block and make none.

    CPU tensors are taken for those of an H100, also where ``torch.compile`` traces a call. Results
    are undefined.
    """
    names: list[str] = []
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, H100.warp_size),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )

    with (
        launches_into(names),
        mock.patch.object(launching, "DEVICES", {"cpu", "cuda"}),
        mock.patch.object(launching, "INTERPRETED", False),
        mock.patch("torch.utils._triton.has_triton", return_value=True),
        mock.patch.object(type(triton.runtime.driver), "active", driver),
        launching.assume_gpu(H100),
    ):
        yield names


@contextmanager
def launches_into(names: list[str]) -> Iterator[None]:
    """Append the name of every Triton launch inside the block to ``names`` and make none."""

    def record(kernel, *args, **options) -> None:
        names.append(kernel.__name__)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(InterpretedFunction, "run", record),
    ):
        yield


class PyTorchLaunches(TorchDispatchMode):
    """Appends to ``names`` every op of PyTorch that computes: a kernel or more each on a GPU."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL and not func.is_view and not func.namespace.startswith("prim"):
            self.names.append(name)
            if name == "convolution" and args[2] is not None:
                self.names.append("bias")  # cuDNN's convolution has none: PyTorch adds it
        return func(*args, **(kwargs or {}))


@contextmanager
def all_launches() -> Iterator[list[str]]:
    """Record the launches of Triton and the ops of PyTorch inside the block, in order."""
    with recorded_launches() as names, PyTorchLaunches(names):
        yield names


def function_calls(call: Callable[[], object]) -> int:
    """Count the function calls of ``call()``, Python's and C's: its host time without noise.

    No garbage is collected meanwhile: the finalizers of what others left would be counted too.
    """
    count = 0

    def profile(frame, event, arg) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return count
