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

ROWS = 1100
WIDTHS = (4096, 4098)  # of 17.2 MiB in float32; rows of the second are not aligned to a vector
OPS = ("rms_norm", "add_rms_norm", "swiglu")
LARGE = {
    **{op: [{"num_rows": ROWS, "width": width} for width in WIDTHS] for op in OPS},
    "rope": [
        {"batch": 1, "tokens": ROWS, "num_heads": 32, "num_kv_heads": 8, "head_dim": head_dim}
        for head_dim in (128, 122)
    ],
    "cross_entropy": [{"tokens": 35, "classes": classes} for classes in (131072, 131073)],
    "group_norm_silu": [
        {"shape": [1, channels, 270, 260], "groups": channels // 2} for channels in (64, 66)
    ],
    "spatial_norm_silu": [
        {"shape": [1, channels, 272, 264], "latent": [34, 33], "groups": channels // 2}
        for channels in (64, 66)
    ],
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("op", "backend"), [(op, b) for op in OPS for b in backends(op) if b.startswith("cpu")]
)
def test_rows_of_a_large_result_equal_the_same_rows_alone(op, backend, width):
    inputs = cases(op).make(num_rows=ROWS, width=width, dtype=torch.float32, device="cpu")
    name, level = at_level(backend)
    call = partial(public(op), backend=name)
    with level, torch.no_grad():
        whole = call(**inputs)
        pieces = [call(**piece) for piece in split(inputs)]
    for result in range(len(whole) if isinstance(whole, tuple) else 1):
        take = (lambda x, i=result: x[i]) if isinstance(whole, tuple) else (lambda x: x)
        assert torch.equal(take(whole), torch.cat([take(piece) for piece in pieces]))


@pytest.mark.parametrize(
    ("op", "backend", "size"), [(op, "cpu", size) for op in LARGE for size in LARGE[op]]
)
def test_a_large_result_and_its_gradients_are_accurate(op, backend, size):
    inputs = cases(op).make(**size, dtype=torch.float32, device="cpu")
    oracle = reference(op)
    actual = value_and_gradients(op, partial(public(op), backend=backend), inputs)
    assert max(value.numel() for value in actual.values()) * 4 >= 16 << 20
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
