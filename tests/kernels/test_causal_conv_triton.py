"""What is special about causal convolutions in Triton: videos in pieces, and the same bits twice.

Float32 is interpreted; bfloat16, which the interpreter gets wrong, is run by ttsem.
"""

import os
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from emu3_kernels import causal_conv3d, temporal_residual
from emu3_kernels.ops.causal_conv3d.cache import FrameCache
from emu3_kernels.ops.temporal_residual import cases

FRAMES, CHANNELS = 7, 6
EMULATED = pytest.mark.skipif(not find_spec("ttsem"), reason="ttsem is not installed")

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)


def running(emulate):
    """Return the context in which kernels run here: a session of ttsem, or none."""
    if not emulate:
        return nullcontext()
    from tests.kernels.emulated import emulated

    return emulated()


def drawn(*shape, device, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(device, dtype)


def check_stream(kernel, stride, pieces, device, dtype, emulate=False):
    x = drawn(1, CHANNELS, FRAMES, 5, 9, device=device, dtype=dtype, seed=0)
    weight = drawn(CHANNELS, CHANNELS, kernel, 3, 3, device=device, dtype=dtype, seed=1)
    scale, shift, bias = drawn(3, CHANNELS, device=device, dtype=dtype, seed=2)
    settings = {"stride": (stride, 1, 1), "scale": scale, "shift": shift, "backend": "triton"}
    settings |= {"activation": "silu", "post_activation": "silu"}
    with running(emulate):
        whole = causal_conv3d(x, weight, bias, **settings)
        cache, parts = FrameCache(), []
        for piece in x.split(pieces, dim=2):
            part, cache = causal_conv3d(piece, weight, bias, cache=cache, **settings)
            parts.append(part)
    assert len(parts) == len(pieces)
    assert torch.equal(torch.cat(parts, dim=2), whole)


PIECES = [(3, 1, (1, 1, 3, 2)), (4, 2, (1, 4, 2))]


@pytest.mark.parametrize(("kernel", "stride", "pieces"), PIECES)
def test_a_video_in_pieces_has_the_bits_of_the_whole(kernel, stride, pieces, device):
    """A pixel is in another row of another block, and early pieces have zeros of their own."""
    check_stream(kernel, stride, pieces, device, torch.float32)


@EMULATED
@pytest.mark.parametrize(("kernel", "stride", "pieces"), PIECES)
def test_a_video_in_pieces_has_the_bits_of_the_whole_in_bfloat16(kernel, stride, pieces, emulating):
    emulating(check_stream, kernel, stride, pieces, "cpu", torch.bfloat16, True)


def check_block(device, dtype, emulate=False):
    inputs = cases.make(shape=[1, 5, 4, 5, 9], dtype=dtype, device=device)
    x, *first, scale2, shift2, weight2, bias2 = inputs.values()
    scale1, shift1, weight1, bias1 = first
    settings = {"activation": "silu", "backend": "triton"}
    with running(emulate):
        actual = temporal_residual(**inputs, backend="triton")
        hidden = causal_conv3d(x, weight1, bias1, scale=scale1, shift=shift1, **settings)
        expected = causal_conv3d(
            hidden, weight2, bias2, scale=scale2, shift=shift2, residual=x, **settings
        )
    assert torch.equal(actual, expected)


def test_the_residual_block_has_the_bits_of_two_calls(device):
    check_block(device, torch.float32)


@EMULATED
def test_the_residual_block_has_the_bits_of_two_calls_in_bfloat16(emulating):
    emulating(check_block, "cpu", torch.bfloat16, True)


def test_weights_of_a_wider_dtype_are_not_rounded(device):
    """Float32 master weights of a float16 video: the product runs in float32."""
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float16, device=device)
    weight = torch.full((1, 1, 1, 1, 1), 1 + 2**-12, device=device)
    bias = torch.full((1,), -1.0, device=device)
    assert causal_conv3d(x, weight, bias, backend="triton").item() == 2**-12


def test_a_video_of_too_many_pixels_is_refused_by_name(device):
    x = torch.empty(1, device=device).expand(1, 1, 2**10, 2**10, 2**10)
    weight = torch.empty(1, 1, 1, 1, 1, device=device)
    with pytest.raises(NotImplementedError, match=f"less than {2**30} pixels of a video"):
        causal_conv3d(x, weight, None, backend="triton")
