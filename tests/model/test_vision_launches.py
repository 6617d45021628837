"""How many kernels a GPU would launch for an image of 512 x 512, counted without one.

The tokenizer is of fake tensors that Triton takes: PyTorch's own ops are seen by a dispatch mode,
and our launches are recorded.
"""

import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to count", allow_module_level=True)

from emu3.config import VISION_PRESETS
from emu3.vision.tokenizer import VisionTokenizer
from emu3_kernels import use_backend
from emu3_kernels.runtime import gemm
from emu3_kernels.testing.launches import PyTorchLaunches, recorded_launches

GEMMS = ("convolution", "mm", "bmm", "addmm", "baddbmm")


OURS = "group_norm_silu", "spatial_norm_silu", "conv3x3", "causal_conv3d", "temporal_residual"


@contextmanager
def fake_gpu():
    """Make new tensors fake ones, which Triton takes as on an H100, and record its launches."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gemm, "SLOW_IN_BFLOAT16", False))
        stack.enter_context(use_backend("triton", *OURS))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(recorded_launches())


def tokenizer_without_values():
    with ExitStack() as stack:
        for draw in ("uniform_", "normal_"):
            same = mock.patch.object(torch.Tensor, draw, lambda self, *_, **__: self)
            stack.enter_context(same)
        stack.enter_context(mock.patch("emu3.vision.tokenizer._initialise", return_value=None))
        torch.set_default_dtype(torch.bfloat16)
        return VisionTokenizer(VISION_PRESETS["8b"]).eval()


def count(direction):
    """Return the kernels of PyTorch and ours, by name, of the second image."""
    before = torch.get_default_dtype()
    try:
        with fake_gpu() as launches, torch.no_grad():
            tokenizer = tokenizer_without_values()
            pixels, codes = torch.empty(1, 1, 3, 512, 512), torch.empty(1, 4, 1, 64, 64)
            for _ in range(2):
                launches.clear()
                kernels = []
                with PyTorchLaunches(kernels):
                    if direction == "encode":
                        tokenizer.latents(pixels)
                    else:
                        tokenizer.pixels(codes, is_image=True)
    finally:
        torch.set_default_dtype(before)
    return Counter(kernels), Counter(launches)


@pytest.mark.parametrize(("direction", "most"), [("encode", 60), ("decode", 60)])
def test_few_kernels_of_pytorch_are_around_the_convolutions(direction, most, compiling):
    theirs, _ = compiling(count, direction)
    elementwise = {n: c for n, c in theirs.items() if n not in GEMMS and "attention" not in n}
    assert sum(elementwise.values()) <= most, elementwise


def test_a_norm_is_two_launches_and_a_residual_convolution_adds_once(compiling):
    _, ours = compiling(count, "decode")
    norms = ours["group_norm_fwd_kernel"]
    assert ours["group_norm_moments_kernel"] == norms == 33
    assert ours["conv3x3_add_kernel"] == 28
