"""Activations stay channels-last: nothing between the pixels and the codes is laid out anew."""

from collections.abc import Callable

import pytest
import torch

from emu3_kernels.runtime import gemm, library
from tests.model.vision_parts import images, random_tokenizer

SIDE = 128
"""The smallest activations of many channels have 128 * 16 * 16 elements here."""
LARGE = 128 * 16 * 16

pytestmark = pytest.mark.skipif(
    bool(library.MISSING), reason="needs the native kernels; references lay out as they like"
)


@pytest.fixture(autouse=True)
def convolutions_as_they_are(monkeypatch):
    """Where PyTorch is slow in bfloat16 their operands are converted to float32, by copies."""
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", False)


def copied(call: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of large activations that a call copies as they are, to another layout or dtype."""
    call()
    with torch.profiler.profile(record_shapes=True) as profiled:
        call()
    copies = [event.input_shapes for event in profiled.events() if event.name == "aten::copy_"]
    whole = [tuple(to) for to, source, *_ in copies if to == source and len(to) in (4, 5)]
    return [shape for shape in whole if torch.Size(shape).numel() >= LARGE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_copies_the_pixels_and_what_a_stride_of_two_pads(dtype):
    """PyTorch's convolutions pad both ends alike, so the pads at one end are written out."""
    tokenizer, pixels = random_tokenizer().to(dtype), images(1, 3, SIDE, SIDE).to(dtype)
    padded = [(1, 32, 128, 128), (1, 64, 64, 64), (1, 64, 32, 32)]
    assert copied(lambda: tokenizer.encode(pixels)) == [(1, 3, 128, 128), *padded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_copies_nothing(dtype):
    """Nor the weights of its doublings, which are summed in the first call."""
    tokenizer = random_tokenizer().to(dtype)
    codes = torch.zeros(1, SIDE // 8, SIDE // 8, dtype=torch.int64)
    assert copied(lambda: tokenizer.decode(codes)) == []


@pytest.mark.parametrize(("allow_tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_float32_is_multiplied_in_float32_unless_tf32_is_allowed(allow_tf32, precision):
    """Codes of a GPU would differ from a CPU's: cuDNN rounds to TF32 by default."""
    tokenizer, seen = random_tokenizer(), []
    tokenizer.allow_tf32 = allow_tf32
    conv = torch.backends.cudnn.conv
    hook = tokenizer.encoder.conv_in.register_forward_hook(
        lambda *_: seen.append(conv.fp32_precision)
    )
    before = conv.fp32_precision
    with torch.no_grad():
        tokenizer.encode(images(1, 3, 32, 32))
    hook.remove()
    assert seen == [precision]
    assert conv.fp32_precision == before
