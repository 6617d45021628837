"""What the ops over the last dimension share: any dimensions before it, and what they refuse."""

import pytest
import torch

from emu3_kernels import add_rms_norm, rms_norm, swiglu, swiglu_packed
from emu3_kernels.testing.suite import at_level, backends, runnable

D = 24
WEIGHT = torch.linspace(0.5, 1.5, D)
OPS = {
    "rms_norm": lambda x: rms_norm(x, WEIGHT),
    "add_rms_norm": lambda x: torch.stack(add_rms_norm(x, 2 * x, WEIGHT)),
    "swiglu": lambda x: swiglu(x, x + 1),
    "swiglu_packed": swiglu_packed,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gradient", [False, True])
def test_dimensions_before_the_last_are_rows(op, gradient):
    x = torch.randn(2, 3, 4, D, generator=torch.Generator().manual_seed(0))
    flat = OPS[op](x.view(-1, D))
    for shape in [(24, D), (6, 4, D), (2, 3, 4, D)]:
        out = OPS[op](x.view(shape).requires_grad_(gradient))
        assert out.shape[-len(shape) : -1] == shape[:-1]
        assert torch.equal(out.reshape(flat.shape), flat)
    one = OPS[op](x[0, 0, 0].requires_grad_(gradient))
    assert torch.equal(one, flat[..., 0, :])
    assert OPS[op](x[:, :, :0]).numel() == 0


@pytest.mark.parametrize("norm", [rms_norm, lambda x, weight: add_rms_norm(x, x, weight)])
def test_a_norm_refuses_a_weight_that_does_not_fit(norm):
    x = torch.ones(2, D)
    for weight in (WEIGHT[:-1], WEIGHT[None], WEIGHT.to("meta")):
        with pytest.raises(ValueError, match=rf"rms_norm: weight must be \[{D}\] on cpu"):
            norm(x, weight)
    with pytest.raises(TypeError, match="rms_norm: weight must be floating point, got"):
        norm(x, WEIGHT.long())
    with pytest.raises(TypeError, match="rms_norm: x must be floating point, got"):
        norm(x.long(), WEIGHT)
    with pytest.raises(
        ValueError, match=r"rms_norm: x must be \[\.\.\., C\], got a tensor without"
    ):
        norm(x[0, 0], WEIGHT)


def test_two_inputs_that_must_be_alike_are_named_with_what_they_are():
    x = torch.ones(2, D)
    for other in (x[:1], x.bfloat16(), x.to("meta")):
        with pytest.raises(ValueError, match=r"gate and up must share .*, got \(2, 24\) torch.fl"):
            swiglu(x, other)
        with pytest.raises(ValueError, match="x and residual must share shape, dtype and device"):
            add_rms_norm(x, other, WEIGHT)
    for pair in [(x, x.long()), (x.long(), x), (x.long(), x.long())]:
        with pytest.raises(TypeError, match="must be floating point, got"):
            swiglu(*pair)
    with pytest.raises(ValueError, match="swiglu: gate must be"):
        swiglu(x[0, 0], x[0, 0])


@pytest.mark.parametrize("backend", [*backends("swiglu"), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_may_be_as_low_as_numbers_go(backend, dtype):
    dtype, (name, level) = runnable(backend, dtype), at_level(backend)
    gate = torch.tensor([torch.finfo(dtype).min, -3e4, -200, -90, 1], dtype=dtype)
    gate, up = gate.requires_grad_(), torch.full((5,), 2.0, dtype=dtype)
    with level:
        y = swiglu(gate, up, backend=name)
        y.sum().backward()
    for result in (y, gate.grad):
        assert (result[:4].abs() <= 1e-30).all()
        assert result[4] > 1
