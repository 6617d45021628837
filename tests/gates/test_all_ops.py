"""Every op, backend, level, size, dtype: values, gradients, layouts, compilation, registration."""

import os
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import emu3_kernels
from emu3_kernels.ops import OPS
from emu3_kernels.runtime import library
from emu3_kernels.testing.suite import (
    DTYPES,
    at_level,
    backends,
    backends_of,
    calls,
    cases,
    check_call,
    device_of,
    differentiable,
    is_lower_level,
    may_refuse,
    must_run,
    public,
    value_and_gradients,
)

REQUIRED = os.environ.get("EMU3_REQUIRE", "").split(",")
OF_OPS = [(op, backend) for op in OPS for backend in backends(op)]


def test_required_backends_are_there():
    assert not ("cpu" in REQUIRED and library.MISSING), library.MISSING
    for op in OPS:
        present = backends_of(op)
        absent = {b: present[b] for b in REQUIRED if isinstance(present.get(b), str)}
        assert not absent, f"{op}: {absent}"


def params() -> list:
    """Every call that must run; ``make check`` runs the largest size of each op at one dtype."""
    listed = []
    for op, backend, size, dtype in calls():
        i, name = list(cases(op).check).index(size), str(dtype).removeprefix("torch.")
        largest = i == len(cases(op).check) - 1 and dtype == must_run(op, at_level(backend)[0])[-1]
        marks = [pytest.mark.check] if largest and not is_lower_level(backend) else []
        listed.append(
            pytest.param(op, backend, size, dtype, id=f"{op}-{backend}-{i}-{name}", marks=marks)
        )
    return listed


@pytest.mark.parametrize(("op", "backend", "size", "dtype"), params())
def test_value_and_gradients(op, backend, size, dtype):
    assert check_call(op, backend, size, dtype) is None


@pytest.mark.parametrize(("op", "backend"), OF_OPS)
def test_a_dtype_that_may_be_refused_is_refused_or_right(op, backend):
    for dtype in may_refuse(op, at_level(backend)[0]):
        for size in cases(op).check:
            check_call(op, backend, size, dtype)


def strided(tensor):
    """The same values in rows twice as long."""
    if tensor.dim() == 0:
        return tensor
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


def transposed(tensor):
    """The same values with the last two dimensions swapped in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def first_taken(op, name, call, device):
    """Return inputs of the first dtype that ``call`` takes, and the results.

    That is the first which the backend must run, if there is one: it may not refuse it.
    """
    must = must_run(op, name)
    for dtype in must[:1] or DTYPES:
        inputs = cases(op).make(**cases(op).check[-1], dtype=dtype, device=device)
        with nullcontext() if must else suppress(NotImplementedError):
            return inputs, value_and_gradients(op, call, inputs)
    pytest.skip("every dtype is refused here")


@pytest.mark.parametrize(("op", "backend"), OF_OPS)
def test_the_layout_of_the_inputs_changes_nothing(op, backend):
    name, level = at_level(backend)
    call = partial(public(op), backend=name)
    with level:
        inputs, expected = first_taken(op, name, call, device_of(backend))
        for layout in strided, transposed:
            relaid = {key: layout(inputs[key]) for key in differentiable(op, inputs)}
            actual = value_and_gradients(op, call, inputs | relaid)
            for value in expected:
                assert torch.equal(actual[value], expected[value]), (layout.__name__, value)


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in OPS for b in ("cpu", "reference")])
def test_compiles_as_one_graph(op, backend):
    """Triton's own launches are traced on a GPU only: its interpreter is plain Python."""
    torch.compiler.reset()
    size, dtype = cases(op).check[-1], must_run(op, backend)[0]
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    call = partial(public(op), backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual = value_and_gradients(op, compiled, inputs)
    for value, expected in value_and_gradients(op, call, inputs).items():
        assert torch.equal(actual[value], expected), value


class Recorder(TorchDispatchMode):
    """Records the arguments of every native op that is called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "emu3_kernels":
            self.calls[function] = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_native_ops_are_registered_right(op):
    size, dtype = cases(op).check[-1], must_run(op, "cpu")[0]
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    with Recorder() as recorder:
        value_and_gradients(op, partial(public(op), backend="cpu"), inputs)
    assert recorder.calls
    for function, args in recorder.calls.items():
        torch.library.opcheck(function, args)


@pytest.mark.check
@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend_is_named(op):
    inputs = cases(op).make(**cases(op).check[-1], dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=f"{op}: unknown backend 'cobol'; expected one of"):
        public(op)(**inputs, backend="cobol")


def test_every_op_is_public():
    assert set(OPS) <= set(emu3_kernels.__all__)
