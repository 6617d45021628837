"""Token parity: codes of other precisions beside those of float32."""

import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.suites import parity
from emu3.config import VISION_PRESETS
from emu3.data.media import write_image
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision


def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(VISION_PRESETS["mini"]).eval()


def test_float32_again_changes_no_code_and_bfloat16_some():
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    model = tokenizer()
    again = [model.encode(image[None])[0] for image in images]
    (row, *_) = parity.rows_of(model, images)
    same = parity._codes(model, images, "cpu", "float32")
    assert all(a.equal(b) for a, b in zip(again, same, strict=True))
    assert (row["device"], row["precision"], row["codes"]) == ("cpu", "bfloat16", 192)
    assert 0 < row["share"] <= row["most"] <= 1


def test_the_command_prints_a_table(tmp_path):
    save_vision(tmp_path / "vision.safetensors", tokenizer())
    write_image(tmp_path / "a.png", torch.randint(256, (3, 64, 64)).byte())
    words = [tmp_path / "vision.safetensors", tmp_path / "a.png", "--min-pixels", "4096"]
    shown = CliRunner().invoke(front.app, ["parity", *map(str, words)])
    assert shown.exit_code == 0, shown.output
    assert "bfloat16" in shown.output
