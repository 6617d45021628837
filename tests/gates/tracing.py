"""Traces ops with their Triton kernels as one graph, without a GPU: their launches are recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from emu3_kernels.runtime import launch
from emu3_kernels.testing.codegen import recorded
from emu3_kernels.testing.suite import cases, differentiable, public


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


def traced(op: str, size: dict, dtype: torch.dtype, *, training: bool) -> tuple[list[str], str]:
    """Compile ``op`` with ``fullgraph=True`` and run it: the kernels launched, and its graph."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    call = torch.compile(partial(public(op), backend="triton"), fullgraph=True, backend=keep)
    with faked_gpu() as launches:
        names = differentiable(op, inputs) if training else ()
        for name in names:
            inputs[name].requires_grad_()
        result = call(**inputs)
        if training:
            result.backward(torch.ones_like(result))
    return [one.kernel.__name__ for one in launches], graphs[0]
