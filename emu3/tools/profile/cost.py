"""COUNTED: the bytes and FLOPs of every op of a call. BOUND: the least time on this machine."""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from emu3.timing import seconds_of
from emu3_kernels.modules import speed_up_bfloat16


@dataclass
class Cost:
    """Bytes and FLOPs of the calls of one op."""

    num_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Machine:
    """Rates measured here: bytes a second read from memory, FLOPs a second of a matmul."""

    bytes_per_second: float
    flops_per_second: float

    def bound(self, cost: Cost) -> float:
        """Lower bound of the seconds of ``cost``."""
        return max(cost.num_bytes / self.bytes_per_second, cost.flops / self.flops_per_second)


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Time the sum of 1 GiB and the GEMM of two square matrices in ``dtype``."""
    numbers = torch.ones(1 << 28, device=device)
    x = torch.randn(2048, 2048, device=device).to(dtype)
    linear = nn.Linear(2048, 2048, bias=False, device=device, dtype=dtype).requires_grad_(False)
    linear = speed_up_bfloat16(linear)
    return Machine(
        numbers.nbytes / median(seconds_of(numbers.sum, device) for _ in range(5)),
        2 * 2048**3 / median(seconds_of(lambda: linear(x), device) for _ in range(5)),
    )


class CostCounter(TorchDispatchMode):
    """Counts every op and every Triton launch inside the block, by its name in the profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.launches: Counter[str] = Counter()
        """How often each Triton kernel was launched."""
        self._outer = ExitStack()

    def __enter__(self) -> "CostCounter":
        if find_spec("triton"):
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kind in (JITFunction, InterpretedFunction):
                self._outer.enter_context(mock.patch.object(kind, "run", self._counted(kind.run)))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._outer.close()

    def _counted(self, run: Callable) -> Callable:
        def count_and_run(kernel, *args, **options):
            name = kernel.__name__
            given = dict(zip(kernel.arg_names, args, strict=False)) | options
            self.launches[name] += 1
            self.costs[name].num_bytes += _KERNEL_BYTES.get(name, _kernel_bytes)(given)
            return run(kernel, *args, **options)

        return count_and_run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        cost = self.costs[function._schema.name]
        cost.num_bytes += _bytes(function, args, kwargs, result)
        cost.flops += _flops(function, args, kwargs, result)
        return result

    @property
    def total(self) -> Cost:
        costs = self.costs.values()
        return Cost(sum(c.num_bytes for c in costs), sum(c.flops for c in costs))


def _bytes(function, args: tuple, kwargs: dict, result: object) -> int:
    """Inputs read once and results written once; ops that read a part have a formula."""
    name = function._schema.name
    if name in _BYTES:
        return _BYTES[name](result, *args, **kwargs)
    if function.is_view or "empty" in name:
        return 0
    tensors = {t.data_ptr(): t for t in tree_leaves((args, kwargs, result)) if _is_tensor(t)}
    return sum(map(_size, tensors.values()))


def _flops(function, args: tuple, kwargs: dict, result: object) -> int:
    if function._schema.name in _FLOPS:
        return _FLOPS[function._schema.name](*args, **kwargs)
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _size(tensor: Tensor) -> int:
    """Bytes behind a tensor: an expanded one has fewer than its shape implies."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _rope_append_bytes(result, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    return 2 * sum(map(_size, (q, k, v)))


def _decode_bytes(result, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *_) -> int:
    token = k_cache.shape[-2] * k_cache.shape[-1] * k_cache.element_size()
    return 2 * _size(q) + 2 * token * int(lengths.sum())


def _kernel_bytes(given: dict[str, object]) -> int:
    """Every tensor of a launch once; a kernel that reads a part has a formula."""
    tensors = {t.data_ptr(): t for t in given.values() if _is_tensor(t)}
    return sum(map(_size, tensors.values()))


def _rope_append_kernel_bytes(given: dict[str, object]) -> int:
    return 2 * sum(_size(given[name]) for name in ("q_ptr", "k_ptr", "v_ptr"))


def _decode_kernel_bytes(given: dict[str, object]) -> int:
    return _decode_bytes(*(given[f"{name}_ptr"] for name in ("out", "q", "k", "v", "lengths")))


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, *_) -> int:
    pairs = int((end - first).clamp_min(0).sum()) * (q.shape[0] // first.shape[0])
    return 4 * q.shape[2] * q.shape[3] * pairs


def _decode_flops(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *_) -> int:
    return 4 * q.shape[1] * q.shape[2] * q.shape[3] * int(lengths.sum())


_BYTES = {
    "aten::embedding": lambda result, *_, **__: 2 * _size(result),
    "emu3_kernels::rope_append": _rope_append_bytes,
    "emu3_kernels::decode_attention": _decode_bytes,
}
_KERNEL_BYTES = {
    "rope_append_kernel": _rope_append_kernel_bytes,
    "decode_attention_kernel": _decode_kernel_bytes,
}
_FLOPS = {
    "emu3_kernels::matmul": lambda a, b, *_: 2 * a.shape[0] * b.numel(),
    "emu3_kernels::attention": _attention_flops,
    "emu3_kernels::decode_attention": _decode_flops,
}
