"""The generic suite as a machine with a GPU sees it: which rows, on which device; no GPU needed.

Fake tensors have a device and no memory, and refuse an op on tensors of two devices. So every row
of Triton runs its host code, forward and backward, as on a GPU; its launches are recorded.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from emu3_kernels.ops import OPS
from emu3_kernels.runtime import launch
from emu3_kernels.testing import suite

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where a shape or a value is known on a real device alone."""
H100 = {
    "warp_size": 32,
    "multi_processor_count": 132,
    "major": 9,
    "minor": 0,
    "name": "NVIDIA H100",
    "total_memory": 80 << 30,
    "L2_cache_size": 50 << 20,
    "shared_memory_per_block_optin": 227 << 10,
}


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch believes in an H100; the launches of Triton kernels are in the list."""
    launches = []
    properties = SimpleNamespace(**H100)
    for name, answer in {
        "is_available": True,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "mem_get_info": (79 << 30, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_gpus", {})
    record = lambda kernel, *args, **options: launches.append((kernel, args))  # noqa: E731
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", record)
    return launches


def test_every_backend_is_checked_on_the_device_it_has(gpu):
    devices = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
    listed = [(op, backend) for op in OPS for backend in suite.backends(op)]
    for _, backend in listed:
        assert suite.device_of(backend) == devices[backend.partition("@")[0]], backend
    dtypes = {dtype for _, backend, _, dtype in suite.calls() if backend == "triton"}
    assert dtypes == set(suite.DTYPES)


class Context(SimpleNamespace):
    """What an ``autograd.Function`` gets, without autograd, which needs a real device."""

    saved_tensors: tuple = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


@pytest.fixture
def differentiated(monkeypatch):
    """Every ``Function.apply`` runs its backward too; the gradients are in the list."""
    gradients = []

    def apply(function, *args):
        floating = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in args]
        ctx = Context(needs_input_grad=tuple(floating))
        results = function.forward(ctx, *args)
        outs = results if isinstance(results, tuple) else (results,)
        douts = [torch.zeros_like(x) if isinstance(x, torch.Tensor) else None for x in outs]
        made = function.backward(ctx, *douts)
        made = made if isinstance(made, tuple) else (made,)
        gradients.extend(x for x in made if x is not None)
        return results

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(apply))
    return gradients


def fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in suite.backends(op)])
def test_a_row_of_triton_takes_tensors_on_a_gpu_and_makes_no_others(
    op, gpu, differentiated, monkeypatch
):
    """Host code that makes a tensor on the CPU, or that refuses a dtype it must take, fails."""
    for size in suite.cases(op).check:
        for dtype in suite.must_run(op, "triton"):
            made = suite.cases(op).make(**size, dtype=dtype, device="cpu")
            if suite.differentiable(op, made):
                monkeypatch.setattr(forward_ad, "_current_level", 0)  # as if a gradient was needed
            with FakeTensorMode(), torch.no_grad():
                inputs = tree_map_only(torch.Tensor, fake, made)
                try:
                    results = suite.public(op)(**inputs, backend="triton")
                except UNKNOWN:
                    continue
            results = results if isinstance(results, tuple) else (results,)
            assert {x.device.type for x in (*results, *differentiated)} == {"cuda"}
    tensors = [x for _, args in gpu for x in args if isinstance(x, torch.Tensor)]
    assert tensors
    assert all(x.is_cuda for x in tensors)
