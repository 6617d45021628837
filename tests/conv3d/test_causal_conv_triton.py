"""What is special about causal convolutions in Triton: blocks of channels, dtypes, the same bits.

Float32 is interpreted; bfloat16, which the interpreter gets wrong, is run by ttsem.
"""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from emu3_kernels import FrameCache, causal_conv3d, temporal_residual
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference, value_and_gradients

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

EMULATED = pytest.mark.skipif(not find_spec("ttsem"), reason="ttsem is not installed")
WIDE = {"shape": [1, 70, 3, 5, 6], "out": 144, "kernel": [2, 3, 1], "norm": True, "residual": True,
        "activation": "silu", "post_activation": "silu"}  # fmt: skip


def test_two_blocks_of_channels_in_and_out(device):
    """The second of each is ragged: 70 are 64 and 6, and 144 are 128 and 16."""
    inputs = cases("causal_conv3d").make(**WIDE, dtype=torch.float32, device=device)
    triton = partial(causal_conv3d, backend="triton")
    actual = value_and_gradients("causal_conv3d", triton, inputs)
    oracle = reference("causal_conv3d")
    low = value_and_gradients("causal_conv3d", oracle, inputs)
    exact = value_and_gradients("causal_conv3d", oracle, double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@EMULATED
def test_two_blocks_of_channels_in_and_out_in_bfloat16(emulating):
    from tests.gates import emulated

    emulating(emulated.check_value_and_gradients, "causal_conv3d", WIDE, torch.bfloat16)


def check_stream(kernel, stride, pieces):
    random = torch.Generator().manual_seed(0)
    sizes = {"x": (1, 6, sum(pieces), 5, 9), "weight": (6, 6, kernel, 3, 3)}
    sizes |= dict.fromkeys(("bias", "scale", "shift"), (6,))
    given = {name: torch.randn(size, generator=random).bfloat16() for name, size in sizes.items()}
    call = partial(causal_conv3d, **given, stride=(stride, 1, 1), backend="triton")
    call = partial(call, activation="silu", post_activation="silu")
    from tests.gates.emulated import emulated

    with emulated():
        whole = call()
        cache, parts = FrameCache(), []
        for piece in given["x"].split(pieces, dim=2):
            part, cache = call(x=piece, cache=cache)
            parts.append(part)
    assert torch.equal(torch.cat(parts, dim=2), whole)


@EMULATED
@pytest.mark.parametrize(("kernel", "stride", "pieces"), [(3, 1, (1, 1, 3, 2)), (4, 2, (1, 4, 2))])
def test_a_video_in_pieces_has_the_bits_of_the_whole_in_bfloat16(kernel, stride, pieces, emulating):
    """A pixel is in another row of another block, and early pieces have their own zeros."""
    emulating(check_stream, kernel, stride, pieces)


def check_block():
    from tests.gates.emulated import emulated

    inputs = cases("temporal_residual").make(
        shape=[1, 5, 4, 5, 9], dtype=torch.bfloat16, device="cpu"
    )
    first, second = (
        {name: inputs[f"{name}{i}"] for name in ("weight", "bias", "scale", "shift")} for i in "12"
    )
    settings = {"activation": "silu", "backend": "triton"}
    with emulated():
        actual = temporal_residual(**inputs, backend="triton")
        hidden = causal_conv3d(inputs["x"], **first, **settings)
        expected = causal_conv3d(hidden, **second, **settings, residual=inputs["x"])
    assert torch.equal(actual, expected)


@EMULATED
def test_the_residual_block_has_the_bits_of_two_calls_in_bfloat16(emulating):
    emulating(check_block)


def test_weights_of_a_wider_dtype_are_not_rounded(device):
    """Float32 weights of a float16 video: the GEMM runs in float32."""
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float16, device=device)
    weight = torch.full((1, 1, 1, 1, 1), 1 + 2**-12, device=device)
    bias = torch.full((1,), -1.0, device=device)
    assert causal_conv3d(x, weight, bias, backend="triton").item() == 2**-12


def test_a_video_of_too_many_pixels_is_refused_by_name(device):
    x = torch.empty(1, device=device).expand(1, 1, 2**10, 2**10, 2**10)
    weight = torch.empty(1, 1, 1, 1, 1, device=device)
    with pytest.raises(NotImplementedError, match=f"less than {2**30} pixels of a video"):
        causal_conv3d(x, weight, None, backend="triton")
