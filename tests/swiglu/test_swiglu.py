"""swiglu beyond the generic suite: the packed projection, without a copy, and its errors."""

import pytest
import torch

from emu3_kernels import record_backends, swiglu, swiglu_packed
from emu3_kernels.testing.suite import at_level, backends, runnable

BACKENDS = [*backends("swiglu"), "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_op_equals_the_op_on_its_halves(backend, dtype):
    gate_up = torch.randn(2, 3, 2 * 41).to(runnable(backend, dtype)).requires_grad_()
    name, level = at_level(backend)
    with level:
        packed = swiglu_packed(gate_up, backend=name)
        halves = swiglu(*gate_up.chunk(2, dim=-1), backend=name)
        dout = torch.randn_like(packed)
        (dpacked,) = torch.autograd.grad(packed, gate_up, dout)
        (dhalves,) = torch.autograd.grad(halves, gate_up, dout)
    assert torch.equal(packed, halves)
    assert torch.equal(dpacked, dhalves)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_the_halves_of_a_packed_projection_are_not_copied(backend):
    gate_up = torch.randn(3, 2 * 41)
    name, level = at_level(backend)
    with level, torch.profiler.profile() as profile:
        swiglu_packed(gate_up, backend=name)
    ran = {event.key for event in profile.key_averages()}
    # Triton's interpreter itself copies every tensor of a launch with copy_.
    assert not ran & {"aten::contiguous", "aten::clone"}, ran


def test_each_op_records_its_backend():
    gate_up = torch.randn(3, 8)
    with record_backends() as ran:
        swiglu(gate_up, gate_up, backend="reference")
        swiglu_packed(gate_up, backend="reference")
    assert ran == {"swiglu": "reference", "swiglu_packed": "reference"}


def test_bad_arguments_raise():
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match="swiglu: gate and up must share shape, dtype and device"):
        swiglu(x, x[:2])
    with pytest.raises(TypeError, match=r"swiglu: gate must be floating point, got torch\.int32"):
        swiglu(x.int(), x.int())
    with pytest.raises(ValueError, match=r"swiglu: gate must be \[\.\.\., C\]"):
        swiglu(x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match=r"swiglu_packed: gate_up must be \[\.\.\., 2C\], got"):
        swiglu_packed(x[:, :7])
