"""Host cost of every op's Triton backend: function calls of one call, its launches recorded.

They do not depend on the speed of the machine. On one where 35 forward calls take 12 microseconds
and 130 backward ones 75, 51 of the latter and 26 microseconds are ``torch.autograd.grad`` itself
(MEASURED, ``python -m benchmarks host``).
"""

import pytest
import torch

from emu3_kernels.ops import OPS
from emu3_kernels.testing.launches import function_calls, recorded_launches
from emu3_kernels.testing.suite import backends_of, cases, differentiable, public

MOST_CALLS = {
    "rms_norm": (35, 145),
    "add_rms_norm": (45, 125),
    "swiglu": (31, 81),
    "nearest_code": (51, None),
    "rope": (48, 140),
    "rope_append": (77, None),
    "cross_entropy": (74, 91),
    "linear_cross_entropy": (259, 392),
    "attention": (61, 158),
    "decode_attention": (68, None),
    "group_norm_silu": (57, 111),
    "spatial_norm_silu": (100, 141),
    "causal_conv3d": (113, 152),
    "temporal_residual": (112, 227),
    "conv3x3": (60, 112),
    "sample_guided": (46, None),
    "quantized_linear": (52, None),
}
"""Calls forward, and backward: those counted and a tenth for other versions of Python."""

WITH_TRITON = [op for op in OPS if not isinstance(backends_of(op).get("triton", ""), str)]


def smallest(op: str) -> dict:
    """Inputs of a decoded token if the op has such a size, in a dtype that Triton interprets."""
    size = (cases(op).decode or cases(op).check[-1:])[0]
    return cases(op).make(**size, dtype=torch.float32, device="cpu")


def calls_of(op: str) -> tuple[int, int | None]:
    """Count the calls of a forward call without a gradient, and of a backward one; None without."""
    inputs = smallest(op)
    with recorded_launches():
        with torch.no_grad():
            forward = lambda: public(op)(**inputs, backend="triton")  # noqa: E731
            forward()
            num_forward = function_calls(forward)
        if not differentiable(op, inputs):
            return num_forward, None
        leaves = {name: inputs[name].requires_grad_() for name in differentiable(op, inputs)}
        results = public(op)(**inputs, backend="triton")
        results = results if isinstance(results, tuple) else (results,)
        results = [result for result in results if result.requires_grad]
        douts = [torch.ones_like(result) for result in results]
        backward = lambda: torch.autograd.grad(  # noqa: E731
            results, list(leaves.values()), douts, retain_graph=True
        )
        backward()
        return num_forward, function_calls(backward)


@pytest.mark.parametrize("op", WITH_TRITON)
def test_a_call_takes_no_more_host_code_than_counted(op):
    forward, backward = calls_of(op)
    most_forward, most_backward = MOST_CALLS[op]
    assert forward <= most_forward
    assert backward is None or backward <= most_backward
