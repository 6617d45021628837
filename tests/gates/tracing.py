"""Traces ops with their Triton kernels as one graph, without a GPU: their launches are recorded."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch._dynamo.backends.debugging import aot_eager

from emu3_kernels.testing.launches import PyTorchLaunches, recorded_launches
from emu3_kernels.testing.suite import cases, differentiable, public


def traced(
    op: str, size: dict, dtype: torch.dtype, training: bool, backend: str = "triton"
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
    call = partial(public(op), backend=backend)
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
    names: list[str] = []
    with recorded_launches(), PyTorchLaunches(names):
        result = call(**inputs)
        if training:
            torch.autograd.grad(result, leaves, torch.empty_like(result))
    return dict(Counter(names))


def launched(op: str, call: Callable, size: dict, dtype: torch.dtype, training: bool) -> list[str]:
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    for name in differentiable(op, inputs) if training else ():
        inputs[name].requires_grad_()
    with recorded_launches() as launches:
        result = call(**inputs)
        if training:
            result.backward(torch.ones_like(result))
    return launches
