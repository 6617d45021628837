"""add_rms_norm beyond the generic suite: results in ``out``, in place too, and autocast."""

import pytest
import torch

from emu3_kernels import add_rms_norm
from emu3_kernels.testing.suite import at_level, backends, runnable

BACKENDS = [*backends("add_rms_norm"), "reference"]
# Rows of one vector and a tail, and of several; too wide for registers.
SHAPES = [(3, 41), (2, 5, 1030), (2, 33000)]
LARGE = (1100, 4096)


def call(backend, *tensors, **settings):
    name, level = at_level(backend)
    with level:
        return add_rms_norm(*tensors, **settings, backend=name)


def make(shape, dtype):
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=random).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": torch.tensor(5)}], ids=str)
def test_out_receives_the_results_and_may_be_the_inputs(backend, dtype, shape, dropout):
    given = make(shape, runnable(backend, dtype))
    expected = call(backend, *given, **dropout)
    for places in ("new", "x, residual", "residual, x"):
        x, residual, weight = (tensor.clone() for tensor in given)
        new = torch.empty_like(x), torch.empty_like(x)
        out = {"new": new, "x, residual": (x, residual), "residual, x": (residual, x)}[places]
        actual = call(backend, x, residual, weight, **dropout, out=out)
        assert all(a is o for a, o in zip(actual, out, strict=True))
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True)), places


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_result_written_by_nontemporal_stores_is_the_same(backend, dtype):
    x, residual, weight = make((LARGE[0] * 4 // dtype.itemsize, LARGE[1]), dtype)
    expected = call(backend, x, residual, weight)
    call(backend, x, residual, weight, out=(x, residual))
    assert torch.equal(x, expected[0])
    assert torch.equal(residual, expected[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_writing_in_place_compiles_as_one_graph(backend):
    x, residual, weight = make((3, 41), torch.float32)
    expected = add_rms_norm(x, residual, weight, backend=backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def add(x, residual):
        add_rms_norm(x, residual, weight, out=(x, residual), backend=backend)

    add(x, residual)
    arguments = (
        x.clone(),
        residual.clone(),
        weight,
        1e-5,
        0.0,
        None,
        None,
        x.clone(),
        residual.clone(),
    )
    torch.library.opcheck(torch.ops.emu3_kernels.add_rms_norm_out.default, arguments)
    assert torch.equal(x, expected[0])
    assert torch.equal(residual, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_promotes_the_branch_of_a_layer_as_pytorch_s_sum_does(backend):
    x, residual, weight = make((3, 41), torch.float32)
    low = runnable(backend, torch.bfloat16)
    for branch, stream in ((x.to(low), residual), (x, residual.to(low))):
        expected = call(backend, branch.float(), stream.float(), weight)
        with torch.autocast("cpu", low):
            actual = call(backend, branch, stream, weight)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        with pytest.raises(ValueError, match="x and residual must share"):
            call(backend, branch, stream, weight)


def test_an_unusable_out_raises():
    x, residual, weight = make((3, 8), torch.float32)
    with pytest.raises(ValueError, match="out must be two contiguous tensors"):
        add_rms_norm(x, residual, weight, out=(x, x.view(3, 8)))
    with pytest.raises(ValueError, match="out must be two tensors, got 1"):
        add_rms_norm(x, residual, weight, out=(x,))
    with pytest.raises(ValueError, match="out must be two contiguous tensors"):
        add_rms_norm(x, residual, weight, out=(x, torch.empty(8, 3).mT))
    with pytest.raises(ValueError, match="x and y and summed must share shape, dtype and device"):
        add_rms_norm(x, residual, weight, out=(x, residual.double()))
    with pytest.raises(ValueError, match="out has no gradient"):
        add_rms_norm(x.requires_grad_(), residual, weight, out=(x, residual))
