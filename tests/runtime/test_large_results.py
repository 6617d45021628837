"""Results beyond 16 MiB are written past the caches, by other instructions: the numbers stay."""

from functools import partial

import pytest
import torch

from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import (
    at_level,
    backends,
    cases,
    double,
    public,
    reference,
    value_and_gradients,
)

ROWS, WIDTH = 1100, 4096  # 17.2 MiB in float32
OPS = ("rms_norm", "add_rms_norm", "swiglu")


@pytest.mark.parametrize(
    ("op", "backend"), [(op, b) for op in OPS for b in backends(op) if b.startswith("cpu")]
)
def test_rows_of_a_large_result_equal_the_same_rows_alone(op, backend):
    inputs = cases(op).make(num_rows=ROWS, width=WIDTH, dtype=torch.float32, device="cpu")
    name, level = at_level(backend)
    call = partial(public(op), backend=name)
    with level, torch.no_grad():
        whole = call(**inputs)
        pieces = [call(**piece) for piece in split(inputs)]
    for result in range(len(whole) if isinstance(whole, tuple) else 1):
        take = (lambda x, i=result: x[i]) if isinstance(whole, tuple) else (lambda x: x)
        assert torch.equal(take(whole), torch.cat([take(piece) for piece in pieces]))


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_a_large_result_are_accurate(op):
    inputs = cases(op).make(num_rows=ROWS, width=WIDTH, dtype=torch.float32, device="cpu")
    oracle = reference(op)
    actual = value_and_gradients(op, partial(public(op), backend="cpu"), inputs)
    low = value_and_gradients(op, oracle, inputs)
    exact = value_and_gradients(op, oracle, double(inputs))
    for name in actual:
        assert_as_accurate(name, actual[name], low[name], exact[name])


def split(inputs: dict) -> list[dict]:
    """The same call in two pieces, each small enough for the caches."""
    half = ROWS // 2
    return [
        {name: x[piece] if x.dim() == 2 else x for name, x in inputs.items()}
        for piece in (slice(0, half), slice(half, ROWS))
    ]
