"""torch.compile(fullgraph=True) with the Triton kernels of the vision ops, forward and training.

Tracing needs no GPU: the launches of the compiled graph are recorded.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to trace", allow_module_level=True)

from emu3_kernels.testing.suite import cases
from tests.gates.tracing import around, traced

OPS = {
    "causal_conv3d": 8,  # everything at once
    "temporal_residual": 7,
    "group_norm_silu": 5,
    "spatial_norm_silu": 8,
    "conv3x3": 2,
}
"""The ops, and which of their sizes is traced."""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_graph_and_launches_what_it_does_uncompiled(op, training, compiling):
    size = cases(op).check[OPS[op]]
    launched, _, expected = compiling(traced, op, size, torch.float32, training)
    assert sorted(launched) == sorted(expected)  # a graph may order them otherwise


WIDE = {"shape": [1, 64, 3, 5, 8], "out": 64, "kernel": [3, 3, 3], "norm": True, "residual": True,
        "activation": "silu", "post_activation": "silu"}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "training"),
    [("causal_conv3d", False), ("causal_conv3d", True), ("temporal_residual", True)],
)
def test_kernels_around_a_convolution_of_pytorch_are_in_one_graph(op, training, compiling):
    size = WIDE if op == "causal_conv3d" else {"shape": WIDE["shape"]}
    launched, _, expected = compiling(traced, op, size, torch.bfloat16, training, "aten")
    assert expected
    assert sorted(launched) == sorted(expected)


def test_inductor_does_not_see_the_kernel_of_nearest_code(compiling):
    """It would drop enable_fp_fusion=False, and with it the rounding of every multiplication."""
    size = cases("nearest_code").check[4]
    launched, graph, _ = compiling(traced, "nearest_code", size, torch.float32, False)
    assert launched == ["nearest_code_fwd_kernel"]
    assert "emu3_kernels.nearest_code_triton" in graph
    assert "triton_kernel_wrapper" not in graph


FOUR_CHANNELS = {
    "causal_conv3d": {
        "shape": [1, 4, 3, 5, 8], "out": 4, "kernel": [3, 3, 3], "norm": True, "residual": True,
        "post_activation": "silu",
    },
    "temporal_residual": {"shape": [1, 4, 3, 5, 8]},
    "group_norm_silu": {"shape": [2, 64, 5, 7], "groups": 32},
    "spatial_norm_silu": {"shape": [2, 64, 8, 8], "latent": [8, 8], "groups": 32, "width": 1},
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", FOUR_CHANNELS)
def test_no_kernel_of_pytorch_runs_around_ours_in_bfloat16(op, training, compiling):
    """Weights are not widened, packed or copied; no gradient of a residual is added apart."""
    assert compiling(around, op, FOUR_CHANNELS[op], torch.bfloat16, training) == {}
