"""Launches of GPU kernels, counted without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from emu3_kernels.runtime import launch as launching

H100 = launching.Gpu(warp_size=32, num_sms=132)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view", "_reshape_alias", "detach")
"""Besides those whose schema says so."""


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Record the name of every Triton launch inside the block and make none.

    CPU tensors are taken for those of an H100. Results are undefined.
    """
    names: list[str] = []

    def record(kernel, *args, **options) -> None:
        names.append(kernel.__name__)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(InterpretedFunction, "run", record),
        mock.patch.object(launching, "DEVICES", {"cpu", "cuda"}),
        launching.assume_gpu(H100),
    ):
        yield names


class PyTorchLaunches(TorchDispatchMode):
    """Appends to ``names`` every op of PyTorch that computes: a kernel or more each on a GPU."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ALLOCATIONS and name not in VIEWS and not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def all_launches() -> Iterator[list[str]]:
    """Record the launches of Triton and the ops of PyTorch inside the block, in order."""
    with recorded_launches() as names, PyTorchLaunches(names):
        yield names
