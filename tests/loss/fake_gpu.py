"""A call on tensors of a GPU that is not there: its GEMMs, launches and memory, without numbers."""

import weakref
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_kernels.ops.loss import chunking, triton
from emu3_kernels.runtime import launch
from emu3_kernels.testing.launches import H100, launches_into

aten = torch.ops.aten
VIEWS = {"view", "_unsafe_view", "slice", "select", "t", "transpose", "expand", "unsqueeze"}
VIEWS |= {"squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind"}
EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Matrix(NamedTuple):
    """An operand or the result of a GEMM."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int
    dtype: torch.dtype

    def contiguous_extent(self) -> int:
        """Return how many elements follow each other in memory."""
        return self.columns if self.column_stride == 1 else self.rows

    def leading_stride(self) -> int:
        return self.row_stride if self.column_stride == 1 else self.column_stride


class Gemm(NamedTuple):
    out: Matrix
    a: Matrix
    b: Matrix


class Recorded(TorchDispatchMode):
    """What runs on the GPU, in order; custom ops are entered, as they are at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms: list[Gemm] = []
        self.gemm_names: list[str] = []
        self.launches: list[str] = []
        self.waits: list[str] = []
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        entered = getattr(triton, name.split("_")[-2], None) if name.endswith("_triton") else None
        if func.namespace == "emu3_kernels" and entered is not None:
            with self:
                return entered._init_fn(*args, **kwargs)
        if name in ("nonzero", "_local_scalar_dense"):
            self.waits.append(name)
        if name == "nonzero":
            return self.track(torch.arange(args[0].numel(), device=args[0].device)[:, None])
        if name in ("mm", "addmm"):
            return self.gemm(name, args, kwargs)
        if name not in VIEWS | EMPTY:
            self.launches.append(name)
        return self.track(func(*args, **kwargs))

    def gemm(self, name, args, kwargs):
        a, b = args[:2] if name == "mm" else args[1:3]
        out = kwargs.get("out")
        if out is None:
            out = self.track(a.new_empty(a.shape[0], b.shape[1]))
        assert a.shape[1] == b.shape[0]
        assert out.shape == (a.shape[0], b.shape[1])
        self.launches.append(name)
        self.gemm_names.append(name)
        self.gemms.append(Gemm(*(Matrix(*x.shape, *x.stride(), x.dtype) for x in (out, a, b))))
        return out

    def track(self, result):
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, num_bytes):
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def flops(self) -> int:
        return sum(2 * a.rows * a.columns * b.columns for _, a, b in self.gemms)


@contextmanager
def taken_for_a_gpu():
    """Let every tensor pass for one of a GPU."""
    patch = mock.patch.object
    with ExitStack() as stack:
        stack.enter_context(patch(torch.cuda, "current_device", lambda: -1))
        stack.enter_context(patch(torch, "is_autocast_enabled", lambda kind: False))
        for name, value in (("is_cuda", True), ("is_cpu", False)):
            stack.enter_context(patch(torch.Tensor, name, property(lambda _, v=value: v)))
        stack.enter_context(mock.patch.dict(launch._gpus, {-1: H100}))
        yield


@contextmanager
def on_fake_gpu(total_memory: int = 141 << 30):
    """Let tensors of device "meta", which have no numbers, pass for those of a GPU."""
    recorded, patch = Recorded(), mock.patch.object
    with ExitStack() as stack:
        stack.enter_context(launches_into(recorded.launches))
        stack.enter_context(patch(launch, "INTERPRETED", False))
        stack.enter_context(patch(chunking, "_total_memory", lambda device: total_memory))
        stack.enter_context(taken_for_a_gpu())
        stack.enter_context(recorded)
        yield recorded


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, **settings: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **settings)


def unaligned(gemms: list[Gemm]) -> list[Gemm]:
    """Return the GEMMs that cuBLAS cannot run with accesses of 16 bytes.

    A contiguous extent must be a multiple of 8 but for one remainder below a tile; a stride always.
    """
    return [
        gemm
        for gemm in gemms
        if any(
            (x.contiguous_extent() % 8 and x.contiguous_extent() >= 128) or x.leading_stride() % 8
            for x in gemm
        )
    ]
