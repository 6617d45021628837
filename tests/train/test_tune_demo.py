"""``emu3 demo --tune`` on the smallest shapes; its numbers at full size are in its report."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.store import Store
from emu3.demo import tune_quality, voters
from emu3.demo.digits import COLORS, DIGITS, at_rest, caption, load_split, render
from emu3.demo.run_tune import STAGES, run_tune
from tests.train.recipes import DECODER_WORDS, VISION_WORDS

TINY = [word for word in DECODER_WORDS if word.startswith(("model.", "train.steps"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the stage of quality, and one that says where it was called."""
    folder = tmp_path_factory.mktemp("tune")

    def told(start, out, progress):
        with progress.stage("told"):
            assert list(out.iterdir()) == []
            assert (start / "runs/decoder/decoder.safetensors").is_file()
        return {"told": 0.5}

    quality = partial(tune_quality.run, overrides=TINY, samples=1, rounds=1)
    run_tune(folder, VISION_WORDS, DECODER_WORDS, stages={"quality": quality, "other": told})
    return folder


@pytest.mark.e2e
def test_the_report_has_what_every_stage_measured(folder):
    report = json.loads((folder / "report.json").read_text())
    for name in ("before", "after", "unselected"):
        assert 0 <= report[f"quality_digit_accuracy_{name}"] <= 1
        assert 0 <= report[f"quality_color_accuracy_{name}"] <= 1
    assert report["told"] == 0.5
    assert {"train_decoder", "train_quality_after", "told", "total"} <= report["seconds"].keys()
    with Image.open(folder / "quality/quality.png") as image:
        assert image.width >= 1000


@pytest.mark.e2e
def test_the_better_half_by_score_is_what_is_trained_on(folder):
    scores = np.load(folder / "quality/scores.npy")
    assert len(scores) == len(Store(folder / "quality/stores/samples")) == 80
    assert np.isfinite(scores).all()
    weights = [folder / f"quality/runs/{n}/pretrain.safetensors" for n in ("after", "unselected")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_a_second_tuning_replaces_the_first(tmp_path):
    def stage(start, out, progress):
        (out / "new").mkdir()
        return {"runs": len(list(start.glob("*/new")))}

    words = [*VISION_WORDS, "train.steps=1"], [*DECODER_WORDS, "train.steps=1"]
    for _ in range(2):
        report = run_tune(tmp_path, *words, stages={"a": stage})
        assert report["runs"] == 1


def test_a_stage_that_fails_leaves_no_report(tmp_path):
    def stage(start, out, progress):
        raise ValueError("tune: it failed")

    words = [*VISION_WORDS, "train.steps=1"], [*DECODER_WORDS, "train.steps=1"]
    with pytest.raises(ValueError, match="tune: it failed"):
        run_tune(tmp_path, *words, stages={"a": stage})
    assert not (tmp_path / "report.json").exists()


def test_what_selects_prefers_the_digit_and_the_colour_of_the_caption():
    """On real digits that it never saw; the judges vote nowhere."""
    digits = load_split(0.25)[1]
    colors = torch.arange(len(digits)) % len(COLORS)
    images = (render(digits.scans, colors, at_rest(len(digits)), 48) + 1) / 2
    pairs = [(int(d), int(c)) for d, c in zip(digits.labels, colors, strict=True)]
    right = voters.likeness(images, [caption(d, c) for d, c in pairs])
    other_digit = [caption((d + 3) % len(DIGITS), c) for d, c in pairs]
    other_color = [caption(d, (c + 3) % len(COLORS)) for d, c in pairs]
    assert (right > voters.likeness(images, other_digit)).double().mean() > 0.95
    assert (right > voters.likeness(images, other_color)).double().mean() > 0.95


def test_the_command_tunes_by_quality_preferences_and_instructions(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("emu3.demo.run_tune.run_tune", called.append)
    assert CliRunner().invoke(app, ["demo", "--tune", "--out", str(tmp_path)]).exit_code == 0
    assert called == [tmp_path]
    assert list(STAGES) == ["quality", "preferences", "understand"]
    done = CliRunner().invoke(app, ["demo", "--tune", "--video"])
    assert done.stderr.startswith("emu3: demo: --tune trains on images alone")
