"""Second and forward derivatives, and in-place writes: right, or refused, for every op."""

from functools import partial

import pytest
import torch

from emu3_kernels import add_rms_norm, rms_norm, rope, rope_append, rope_tables
from emu3_kernels.ops import OPS
from emu3_kernels.testing.suite import cases, differentiable, public


def call(op):
    """The largest check of ``op`` on a backend of ours, and its inputs that have a gradient."""
    inputs = cases(op).make(**cases(op).check[-1], dtype=torch.float32, device="cpu")
    return partial(public(op), **inputs), {n: inputs[n] for n in differentiable(op, inputs)}


def total(results):
    results = results if isinstance(results, tuple) else (results,)
    return sum(r.square().sum() for r in results if r.is_floating_point())


WITH_GRADIENT = [op for op in OPS if op not in ("linear", "conv3x3") and call(op)[1]]
"""The other two are PyTorch's own in float32."""


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_a_second_derivative_is_refused_and_never_wrong(op):
    function, leaves = call(op)
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    first = torch.autograd.grad(total(function(**leaves)), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        total(first).backward()


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_a_forward_derivative_is_refused_and_never_zero(op):
    function, leaves = call(op)
    name, x = next(iter(leaves.items()))
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: function(**{name: x}), (x,), (torch.ones_like(x),))


def test_a_call_that_writes_over_a_saved_tensor_is_seen():
    weight, tables = torch.ones(4), rope_tables(3, 4)
    q, k, caches = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), torch.ones(2, 1, 3, 2, 4)
    writes = {
        "rope": (q, lambda: rope(q, k, *tables, out=(q, k))),
        "add_rms_norm": (q, lambda: add_rms_norm(q, k, weight, out=(q, k))),
        "rope_append": (
            caches[0],
            lambda: rope_append(q, k, k, *tables, *caches, torch.arange(3)[None]),
        ),
    }
    for name, (written, write) in writes.items():
        factor = torch.ones_like(written, requires_grad=True)
        product = (factor * written).sum()
        with torch.no_grad():
            write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with torch.inference_mode():
            write()  # such tensors have no version to raise
        assert rms_norm(written, weight).isfinite().all(), name
