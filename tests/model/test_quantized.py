"""Decoders in 8 and 4 bits: loaded, generated with, and refused."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emu3.generate import generate_images
from emu3.text import ByteTokenizer
from emu3.weights import files, load_decoder, quantize, quantized, save_decoder
from emu3_kernels.modules import QuantizedLinear
from emu3_kernels.ops.quantized import codes as making
from emu3_kernels.ops.quantized.codes import dequantize
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model.tiny import tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Multiples of 64, and of 32 alone."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    save_decoder(path, tiny_model(**SIZES))
    return path


def with_dequantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with plain linear layers, whose weights are those that the codes stand for."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = dequantize(child.codes, child.scales, dtype)
                setattr(parent, name, linear)
    return plain.to(dtype)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@torch.no_grad()
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(bits, file):
    model = load_decoder(file, weights=bits)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    tokens = torch.arange(40).view(2, 20)
    exact_model, low_model = (with_dequantized(model, d) for d in (torch.float64, torch.float32))
    for rows in (slice(None), slice(100, 300)):
        ours, low, exact = (m.logits(m(tokens), rows) for m in (model, low_model, exact_model))
        assert_as_accurate("logits", ours, low, exact)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_file_is_quantized_as_the_loaded_model_is(bits, file):
    loaded, expected = load_decoder(file, weights=bits), quantize(load_decoder(file), bits)
    theirs = expected.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.equal(theirs[name]), name


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_images_are_generated_and_the_dtype_can_be_changed(bits, file):
    model = load_decoder(file, weights=bits, dtype=torch.bfloat16)
    text = ByteTokenizer(model.settings.vocabulary)
    both = generate_images(model, text, ["a red one", "a blue two"], (2, 3), seeds=[4, 5])
    assert both.shape == (2, 2, 3)
    scales = model.head.scales.clone()
    wide = copy.deepcopy(model).float()
    assert wide.head.scales.equal(scales)
    assert generate_images(wide, text, ["a red one"], (2, 3)).shape == (1, 2, 3)


def test_the_bytes_of_linear_layers_are_halved_and_quartered(file):
    def size(model):
        return sum(v.nbytes for n, v in model.state_dict().items() if "codes" in n or "scales" in n)

    plain = sum(
        module.weight.numel() * 2
        for module in load_decoder(file).modules()
        if isinstance(module, nn.Linear)
    )
    assert 0.5 <= size(load_decoder(file, weights="int8")) / plain < 0.55
    assert 0.25 < size(load_decoder(file, weights="int4")) / plain < 0.3


def test_what_it_cannot_do_is_refused_in_one_line(file, tmp_path):
    model = load_decoder(file, weights="int8")
    with pytest.raises(ValueError, match="its weight is stored in 8 or 4 bits"):
        save_decoder(tmp_path / "again.safetensors", model)
    with pytest.raises(ValueError, match=r"weights: must be one of \('int8', .*\), got 'int3'"):
        load_decoder(file, weights="int3")
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8.9 .* got cpu"):
        load_decoder(file, weights="fp8")
    narrow = tmp_path / "narrow.safetensors"
    save_decoder(narrow, tiny_model())
    with pytest.raises(ValueError, match=r"group_size must be .* divide K = 48, got 32"):
        load_decoder(narrow, weights="int4")
    assert not (tmp_path / "again.safetensors").exists()


@torch.no_grad()
def test_fp8_is_that_of_torchao(file, monkeypatch):
    """The numbers are the same on a CPU, where ``quantize`` refuses it since it is slow."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized, "check_weights", lambda *_: None)
    for name in ("float8.inference", "quantization.quant_api"):
        monkeypatch.setattr(f"torchao.{name}._check_hardware_support", lambda *_: None)
    plain = load_decoder(file, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"fp8 needs a model in bfloat16, got torch.float32"):
        quantize(load_decoder(file), "fp8")
    model = quantize(copy.deepcopy(plain), "fp8")
    assert type(model.head) is type(plain.head)
    linear, x = model.blocks[0].mlp.down, torch.randn(3, 96).bfloat16()
    assert type(linear.weight).__name__ == "Float8Tensor"
    y = nn.functional.linear(x, linear.weight).float()
    exact = nn.functional.linear(x.float(), plain.blocks[0].mlp.down.weight.float())
    assert 0 < (y - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.e2e
def test_loading_never_holds_the_weights_in_full_precision(tmp_path):
    """The peak of a process, for linear layers of 24 MB in bfloat16 and codes of a half of it."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(tmp_path / "decoder.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    size, peak = map(int, done.stdout.split())
    assert peak <= 1.1 * size, f"{peak / size:.2f} times the model in bfloat16"


def growth(path):
    """Bytes of a decoder in bfloat16, and by how many quantizing it raises the peak."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 4}
    model = tiny_model(**sizes).bfloat16()
    size = sum(weight.nbytes for weight in model.parameters())
    save_decoder(path, model)
    del model
    making._PIECE = files._PIECE = 1 << 16  # of 24 MB, as of a model of many gigabytes
    load_decoder(path, weights="int8")
    status = Path("/proc/self/status")

    def bytes_of(name):
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_of("VmRSS")
    kept = load_decoder(path, weights="int8")
    assert kept.head.codes.dtype == torch.int8
    return size, bytes_of("VmHWM") - before


if __name__ == "__main__":
    print(*growth(Path(sys.argv[1])))
