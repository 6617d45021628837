"""Wide causal convolutions by PyTorch's own, between kernels of ours that norm, pad and finish.

Float16 is interpreted; bfloat16, which the interpreter gets wrong, is run by ttsem.
"""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_kernels import FrameCache, causal_conv3d, temporal_residual
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, public, reference, value_and_gradients

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

from emu3_kernels.ops.conv3d.aten import convolve
from emu3_kernels.ops.conv3d.plan import Plan
from emu3_kernels.runtime.contracts import meta
from emu3_kernels.testing.launches import all_launches

BLOCK = {"kernel": [3, 3, 3], "norm": True, "activation": "silu", "residual": True}
STRIDED = {"kernel": [4, 3, 2], "stride": [2, 2, 1], "norm": True, "post_activation": "silu"}
SIZES = [
    {"shape": [2, 64, 4, 5, 6], "out": 66, **BLOCK},
    {"shape": [2, 64, 5, 6, 7], "out": 66, **STRIDED},
    {"shape": [1, 66, 2, 3, 4], "out": 64, **STRIDED, "activation": "silu", "residual": True},
    {"shape": [1, 64, 2, 3, 5], "out": 64, "kernel": [3, 1, 1]},
    {"shape": [1, 64, 2, 3, 5], "out": 64, "kernel": [3, 3, 3], "bias": False},
    {"shape": [0, 64, 2, 3, 5], "out": 64, **BLOCK},
    {"shape": [1, 64, 1, 3, 5], "out": 64, **STRIDED},  # too few frames for one result
]
SMALL = {"shape": [2, 64, 2, 4, 5], "out": 64, **STRIDED, "residual": True}


def inputs_of(op, size, device):
    return cases(op).make(**size, dtype=torch.float16, device=device)


def on_aten(op, inputs):
    return value_and_gradients(op, partial(public(op), backend="aten"), inputs)


def check(op, inputs):
    """The result is rounded once more, before bias and residual."""
    low = value_and_gradients(op, reference(op), inputs)
    exact = value_and_gradients(op, reference(op), double(inputs))
    for name, value in on_aten(op, inputs).items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, device):
    check("causal_conv3d", inputs_of("causal_conv3d", size, device))


@pytest.mark.parametrize("shape", [[1, 64, 2, 4, 3], [0, 64, 2, 4, 3]])
def test_values_and_gradients_of_the_residual_block(shape, device):
    check("temporal_residual", inputs_of("temporal_residual", {"shape": shape}, device))


@pytest.mark.skipif(not find_spec("ttsem"), reason="ttsem is not installed")
def test_values_and_gradients_in_bfloat16(emulating):
    from tests.gates import emulated

    size = SMALL | {"shape": [1, 64, 2, 2, 3]}
    emulating(emulated.check_value_and_gradients, "causal_conv3d", size, torch.bfloat16, "aten")


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor


def spread(tensor):
    """The same values, each between two others."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [channels_last, spread])
def test_the_layout_of_the_inputs_changes_nothing(layout, device):
    inputs = inputs_of("causal_conv3d", SMALL, device)
    relaid = {n: layout(value) for n, value in inputs.items() if isinstance(value, torch.Tensor)}
    actual = on_aten("causal_conv3d", inputs | relaid)
    for name, value in on_aten("causal_conv3d", inputs).items():
        assert torch.equal(actual[name], value), name


def test_gradients_repeat_bit_for_bit(device):
    """The tests ask PyTorch for deterministic algorithms; none of our kernels has atomics."""
    inputs = inputs_of("causal_conv3d", SMALL, device)
    first, second = (on_aten("causal_conv3d", inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_a_piece_of_a_video_is_refused(device):
    """The algorithm of a convolution of PyTorch's own, and so its bits, depend on the size."""
    inputs = inputs_of("causal_conv3d", {"shape": [1, 64, 3, 4, 4], "out": 64, **BLOCK}, device)
    with pytest.raises(NotImplementedError, match="would not have the bits of the whole"):
        causal_conv3d(**inputs, cache=FrameCache(), backend="aten")


def test_a_block_is_refused_for_either_weight(device):
    inputs = inputs_of("temporal_residual", {"shape": [1, 64, 1, 2, 2]}, device)
    for name in ("weight1", "weight2"):
        wide = inputs | {name: inputs[name].float()}
        with pytest.raises(NotImplementedError, match=r"weights of torch\.float32 are left"):
            temporal_residual(**wide, backend="aten")


NAMES = ("x", "weight", "bias", "scale", "shift", "residual")
PREPARED = ["causal_conv3d_pad_kernel", "clone"]
"""The video is padded, and the weights are made channels-last."""
THROUGH_NORM = ["causal_conv3d_pad_bwd_kernel", "causal_conv3d_bwd_add_kernel"]


class Masks(TorchDispatchMode):
    """Collects which of the gradients of input, weight and bias convolutions are asked for."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needed", "mask", "launched"),
    [
        (
            NAMES,
            [True, True, False],
            ["causal_conv3d_finish_bwd_kernel", "causal_conv3d_sum_kernel", *PREPARED,
             "convolution_backward", *THROUGH_NORM],
        ),
        (
            ["x"],
            [True, False, False],
            ["causal_conv3d_finish_bwd_kernel", *PREPARED, "convolution_backward", *THROUGH_NORM],
        ),
        (
            ["weight"],
            [False, True, False],
            ["causal_conv3d_finish_bwd_kernel", *PREPARED, "convolution_backward"],
        ),
        (["bias"], None, ["causal_conv3d_finish_bwd_kernel", "causal_conv3d_sum_kernel"]),
        (["residual"], None, []),
    ],
)  # fmt: skip
def test_only_gradients_that_are_needed_are_computed(needed, mask, launched):
    x, vector = meta(1, 64, 4, 8, 8), meta(64)
    inputs = dict(zip(NAMES, (x, meta(64, 64, 3, 3, 3), vector, vector, vector, x), strict=True))
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in needed]
    with Masks() as asked, all_launches() as names:
        y = convolve(*inputs.values(), Plan(silu=True, post_silu=True))
        names.clear()
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert names == launched
    assert asked.masks == ([] if mask is None else [mask])


@pytest.mark.parametrize("post_silu", [False, True])
def test_only_inputs_are_kept_for_a_gradient(post_silu):
    """And what a SiLU of the result is applied to: to recompute it would take a convolution."""
    x, vector = meta(1, 64, 4, 8, 8), meta(64)
    tensors = [x, meta(64, 64, 3, 3, 3), vector, vector, vector, x]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    kept = []
    keeping = saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None)
    with all_launches(), keeping:
        convolve(*tensors, Plan(silu=True, post_silu=post_silu))
    inputs = sorted(tensor.numel() for tensor in tensors[:5])
    assert sorted(kept) == sorted(inputs + [x.numel()] * post_silu)
