"""GPU backends on tensors of the CPU: a call gets copies on the GPU, and its results come back.

Tests of what is special about an op make their tensors on the CPU and name a backend; on a machine
with a GPU its kernels run there, on tensors of the same strides and with the same views of one
storage. What a kernel writes to comes back too. The generic suite makes its tensors where each
backend runs, and takes no copies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from emu3_kernels.runtime import launch
from emu3_kernels.runtime.dispatch import Backend, Backends

GPU_BACKENDS = ("triton", "triton_gluon", "cuda")


@contextmanager
def on_copies(device: str = "cuda") -> Iterator[None]:
    """Run the GPU backends that calls on CPU tensors name inside the block on ``device``.

    With ``device="cpu"`` they run on copies on the CPU, as a test of the copies.
    """
    named = Backends._named

    def named_there(self: Backends, asked: str, x: Tensor, *rest: object) -> Backend:
        here = asked not in GPU_BACKENDS or not x.is_cpu or torch.compiler.is_compiling()
        if here or ("cpu" in launch.DEVICES and device != "cpu"):
            return named(self, asked, x, *rest)
        backend = named(self, asked, *Copies(device).of((x, *rest)))
        ways = {way: getattr(backend, way) for way in ("forward", "backward", "function")}
        return replace(
            backend, **{way: f and partial(_there, device, f) for way, f in ways.items()}
        )

    with mock.patch.object(Backends, "_named", named_there):
        yield


def _there(device: str, function: Callable, *args: object, **settings: object) -> object:
    copies = Copies(device)
    args, settings = copies.of((args, settings))
    return copies.back(function(*args, **settings))


class Copies:
    """Copies of the CPU tensors of one call; tensors that share memory share it there too."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._storages: dict[int, tuple] = {}
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, given: object) -> object:
        return tree_map_only(Tensor, self._copy, given)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cpu:
            return tensor
        source = tensor.untyped_storage()
        key = source.data_ptr()
        if key not in self._storages:
            target = torch.UntypedStorage(source.nbytes(), device=self.device).copy_(source)
            self._storages[key] = source, target
        with torch.no_grad():
            copy = torch.empty(0, dtype=tensor.dtype, device=self.device)
            where = tensor.storage_offset(), tensor.shape, tensor.stride()
            copy.set_(self._storages[key][1], *where)
        self._originals[id(copy)] = copy, tensor
        return copy

    def back(self, results: object) -> object:
        """Return results on the CPU; what was written to is written here."""
        for source, target in self._storages.values():
            source.copy_(target)
        return tree_map_only(Tensor, self._back, results)

    def _back(self, result: Tensor) -> Tensor:
        _, original = self._originals.get(id(result), (None, None))
        return result.cpu() if original is None else original
