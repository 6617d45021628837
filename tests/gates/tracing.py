"""Traces ops with their Triton kernels as one graph, without a GPU: their launches are recorded."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from emu3_kernels.runtime import launch
from emu3_kernels.testing.codegen import recorded
from emu3_kernels.testing.suite import cases, differentiable, public

NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}
NO_KERNEL |= {"promote_types"}


class Kernels(TorchDispatchMode):
    """Counts the ops of PyTorch that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        name = schema.name.split("::")[1]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not is_view and name not in NO_KERNEL and not schema.name.startswith("prim"):
            self.counted[name] += 1
            if name == "convolution" and args[2] is not None:
                self.counted["bias"] += 1  # cuDNN's convolution has none: PyTorch adds it
        return function(*args, **(kwargs or {}))


@contextmanager
def faked_gpu() -> Iterator[list]:
    """Let Triton take tensors of the CPU and record each launch, as on an H100."""
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    with (
        mock.patch.object(launch, "DEVICES", {"cpu"}),
        mock.patch("torch.utils._triton.has_triton", return_value=True),
        mock.patch.object(type(triton.runtime.driver), "active", driver),
        recorded() as launches,
    ):
        yield launches


def traced(
    op: str, size: dict, dtype: torch.dtype, training: bool
) -> tuple[list[str], str, list[str]]:
    """Run ``op`` compiled with ``fullgraph=True``, then as it is.

    Returns:
        The names of the kernels launched, the graph, and the names launched without a graph.
    """
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    call = partial(public(op), backend="triton")
    compiled = torch.compile(call, fullgraph=True, backend=keep)
    return (
        launched(op, compiled, size, dtype, training),
        graphs[0],
        launched(op, call, size, dtype, training),
    )


def around(op: str, size: dict, dtype: torch.dtype, training: bool) -> dict[str, int]:
    """Count the kernels of PyTorch around ours in one call, and in its backward pass."""
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    call = partial(public(op), backend="triton")
    names = differentiable(op, inputs) if training else ()
    leaves = [inputs[name].requires_grad_() for name in names]
    with faked_gpu(), Kernels() as kernels:
        result = call(**inputs)
        if training:
            torch.autograd.grad(result, leaves, torch.empty_like(result))
    return dict(kernels.counted)


def launched(op: str, call: Callable, size: dict, dtype: torch.dtype, training: bool) -> list[str]:
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    for name in differentiable(op, inputs) if training else ():
        inputs[name].requires_grad_()
    with faked_gpu() as launches:
        result = call(**inputs)
        if training:
            result.backward(torch.ones_like(result))
    return [one.kernel.__name__ for one in launches]
