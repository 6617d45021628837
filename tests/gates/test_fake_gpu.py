"""The generic suite as a machine with a GPU sees it: which rows, on which device; no GPU needed.

Fake tensors have a device and no memory, and refuse an op on tensors of two devices. So every row
of Triton runs its host code, forward and backward, as on a GPU; its launches are recorded.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from emu3_kernels.ops import OPS
from emu3_kernels.runtime import launch
from emu3_kernels.testing import suite

triton = pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where a shape or a value is known on a real device alone."""


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch believes in an H100; the launches of Triton kernels are in the list."""
    launches = []
    properties = SimpleNamespace(warp_size=32, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
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


def on_fake_gpu(inputs: dict, mode: FakeTensorMode) -> dict:
    return tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), inputs)


ROWS = [op for op in OPS if "triton" in suite.backends(op)]


@pytest.mark.parametrize("op", ROWS)
def test_a_row_of_triton_takes_tensors_on_a_gpu_and_no_others(op, gpu):
    """Host code that makes a tensor on the CPU, or that refuses a dtype it must take, fails."""
    call = partial(suite.public(op), backend="triton")
    for size in suite.cases(op).check:
        for dtype in suite.must_run(op, "triton"):
            made = suite.cases(op).make(**size, dtype=dtype, device="cpu")
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                try:
                    results = suite.value_and_gradients(op, call, on_fake_gpu(made, mode))
                except UNKNOWN:
                    continue
            assert {result.device.type for result in results.values()} <= {"cuda"}
    tensors = [x for _, args in gpu for x in args if isinstance(x, torch.Tensor)]
    assert tensors
    assert all(x.is_cuda for x in tensors)
