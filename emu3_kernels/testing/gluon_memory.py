"""What emulated Gluon kernels read and write: registers, global, shared and tensor memory."""

from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

TORCH_DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
    "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


class Value(Tensor):
    """Registers: a tensor that is never changed, and whose ``to`` takes the dtypes of Gluon."""

    def __iadd__(self, other: object) -> Tensor:
        return self + other

    def __imul__(self, other: object) -> Tensor:
        return self * other

    def to(self, dtype: object) -> Tensor:
        if dtype == gl.uint32:
            return self.long() & 0xFFFFFFFF
        return super().to(TORCH_DTYPES[dtype.name])


def value_of(x: Tensor) -> Value:
    return x.as_subclass(Value)


class Pointer:
    def __init__(self, memory: Tensor, at: Tensor | int) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Tensor | int) -> "Pointer":
        return Pointer(self.memory, self.at + offset)

    def load(self) -> Value:
        return value_of(self.memory[torch.as_tensor(self.at).long().as_subclass(Tensor)])

    def store(self, value: Value, mask: Value) -> None:
        at, mask = torch.broadcast_tensors(self.at, mask)
        self.memory[at[mask]] = value.expand(mask.shape)[mask].as_subclass(Tensor)


class Descriptor:
    def __init__(self, host: object) -> None:
        base, self.layout = host.base, host.layout
        self.matrix = base.as_strided(host.shape, host.strides)
        self.block_shape, self.dtype = host.block_shape, _dtype(base.dtype)
        nbytes = prod(host.block_shape) * base.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes)


def argument_of(x: object) -> object:
    if isinstance(x, Tensor):
        memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return Pointer(memory, x.storage_offset())
    return Descriptor(x) if hasattr(x, "block_shape") else x


def _dtype(dtype: torch.dtype) -> object:
    name = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
    return getattr(gl, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[name])


class Shared:
    """Shared memory, NaN until it is written."""

    def __init__(self, data: Tensor, dtype: object) -> None:
        self.data, self.dtype, self.shape = data, dtype, list(data.shape)

    def index(self, i: int) -> "Shared":
        return Shared(self.data[int(i)], self.dtype)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.dtype)

    def load(self, layout: object) -> Value:
        return value_of(self.data.clone())

    def overlaps(self, other: "Shared") -> bool:
        (start, end), (first, last) = _addresses(self.data), _addresses(other.data)
        return start < last and first < end


def _addresses(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class TensorMemory(Shared):
    """Tensor memory: columns of 32 bits, which two elements of 16 bits may share."""

    def __init__(self, data: Tensor, dtype: object, matmuls: "list[Matmul]") -> None:
        super().__init__(data, dtype)
        self.matmuls = matmuls

    def index(self, i: int) -> "TensorMemory":
        return TensorMemory(self.data[i], self.dtype, self.matmuls)

    def slice(self, start: int, length: int) -> "TensorMemory":
        part = self.data[..., start : start + length]
        return TensorMemory(part, self.dtype, self.matmuls)

    def _reinterpret(self, dtype: object, shape: list[int], layout: object) -> "TensorMemory":
        data = self.data.view(TORCH_DTYPES[dtype.name])
        assert list(data.shape) == shape
        return TensorMemory(data, dtype, self.matmuls)

    def load(self, layout: object) -> Value:
        running = any(matmul.acc.overlaps(self) for matmul in self.matmuls)
        assert not running, "tensor memory is read while a matmul writes it"
        return value_of(self.data.clone())

    def store(self, value: Value) -> None:
        running = any(matmul.uses(self) for matmul in self.matmuls)
        assert not running, "tensor memory is written while a matmul uses it"
        assert value.dtype == self.data.dtype
        self.data.copy_(value)


class Matmul:
    """A matmul of tensor cores, from its issue until it has to end."""

    def __init__(
        self, a: Shared, b: Shared, acc: TensorMemory, use_acc: bool, barriers: list
    ) -> None:
        self.a, self.b, self.acc, self.use_acc, self.barriers = a, b, acc, use_acc, barriers

    def uses(self, memory: Shared) -> bool:
        return any(x.overlaps(memory) for x in (self.a, self.b, self.acc))

    def finish(self) -> None:
        exact = torch.matmul(self.a.data.double(), self.b.data.double())
        if self.use_acc:
            exact += self.acc.data
        self.acc.data.copy_(exact)
        for barrier in self.barriers:
            barrier.change(1, 0)
