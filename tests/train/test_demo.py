"""The demo, end to end on the smallest shapes; its numbers at full size are in its report."""

import json

import pytest
import torch
from PIL import Image

from emu3.demo.config import DigitSettings
from emu3.demo.digits import COLORS, at_rest, load_split, render
from emu3.demo.judge import DigitJudge, judge_color
from emu3.demo.run import run_demo
from emu3.demo.stages import decoder_stage, vision_stage
from emu3.tasks import load_recipe
from tests.train.recipes import DECODER_WORDS, VISION_WORDS, decoder_words

ACCURACIES = ("generated_digit_accuracy", "generated_color_accuracy", "caption_digit_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, VISION_WORDS, DECODER_WORDS)
    return folder


def test_the_report_has_every_metric(folder):
    report = json.loads((folder / "report.json").read_text())
    assert all(0 <= report[name] <= 1 for name in ACCURACIES)
    assert report["generated_images"] == 320
    assert report["validation_digits"] + report["train_digits"] == 1797
    assert report["judge_digit_accuracy_on_validation"] > 0.9
    assert set(report["backends"]) >= {"rms_norm", "add_rms_norm", "nearest_code", "rope"}
    assert report["fused_speedup"] > 0
    stages = report["seconds"]
    assert stages["total"] == pytest.approx(sum(stages.values()) - stages["total"])
    assert len(report["captions"]) == 24


@pytest.mark.parametrize("name", ["generated", "reconstructions", "captions", "loss"])
def test_every_image_is_a_large_png(folder, name):
    with Image.open(folder / f"{name}.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1000
        assert image.height >= 400


@pytest.mark.e2e
def test_a_second_demo_reports_the_same_numbers(folder):
    """All but seconds and speeds; the second run also replaces the runs of the first."""
    first = json.loads((folder / "report.json").read_text())
    second = run_demo(folder, VISION_WORDS, DECODER_WORDS)
    clocked = {
        "seconds",
        "fused_speedup",
        "training_tokens_per_second",
        "generated_tokens_per_second",
    }
    assert {k: v for k, v in second.items() if k not in clocked} == {
        k: v for k, v in first.items() if k not in clocked
    }


def test_stages_that_validate_on_different_digits_are_refused(tmp_path):
    """Otherwise the tokenizer would be trained on digits that the decoder is measured on."""
    with pytest.raises(ValueError, match=r"have the same validation digits, got .* 0.25 and 0.5"):
        run_demo(tmp_path, VISION_WORDS, [*DECODER_WORDS, "data.validation=0.5"])
    assert list(tmp_path.iterdir()) == []  # nothing was trained


def test_a_batch_larger_than_all_digits_is_refused():
    """One of 100,000,000 was put together from epochs for hours, before it was too large."""
    recipe = load_recipe("vision", [*VISION_WORDS, "data.batch_size=1348"])
    with pytest.raises(ValueError, match=r"^data.batch_size must be at most the 1347 digits to"):
        vision_stage(recipe)


def test_documents_longer_than_the_positions_are_refused_before_training(tmp_path):
    """It was "rope: positions must lie in [0, 42), got 0 … 42", in the first step."""
    words = decoder_words(tmp_path)
    stage = decoder_stage(load_recipe("digits", [*words, "model.max_position_embeddings=43"]))
    assert max(stage.stream.next_batch()[0].shape[1] for _ in range(20)) - 1 == 43
    recipe = load_recipe("digits", [*words, "model.max_position_embeddings=42"])
    with pytest.raises(
        ValueError, match=r"^train: model.max_position_embeddings \(42\) must be 43"
    ):
        decoder_stage(recipe)


def test_the_judges_know_real_digits_they_never_saw():
    train_set, validation_set = load_split(0.25)
    colors = torch.arange(len(validation_set)) % len(COLORS)
    images = render(validation_set.scans, colors, at_rest(len(validation_set)), 48)
    right = DigitJudge(train_set, DigitSettings(), 48)(images) == validation_set.labels
    assert right.double().mean() > 0.97
    assert judge_color(images).equal(colors)
