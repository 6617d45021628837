"""The preferences of ``emu3 demo --tune`` on the smallest shapes, and its voters."""

import pytest
import torch
from PIL import Image

from emu3.data.pairs import load_pairs
from emu3.demo import tune_dpo
from emu3.demo.digits import COLORS, DIGITS, at_rest, caption, load_split, render
from emu3.demo.miniature import Clock
from emu3.demo.run_tune import STAGES
from emu3.demo.voters import strokes
from emu3.model import Emu3
from emu3.tasks import load_recipe
from emu3.vision import VisionTokenizer
from emu3.weights import save_decoder, save_vision
from tests.train.recipes import DECODER_WORDS, VISION_WORDS

MODEL = [word for word in DECODER_WORDS if word.startswith("model.")]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """What a run of untrained weights returns, and its folder."""
    folder = tmp_path_factory.mktemp("tune")
    recipe = load_recipe("digits", [*VISION_WORDS, *MODEL])
    torch.manual_seed(0)
    save_vision(folder / "runs/vision/vision.safetensors", VisionTokenizer(recipe.vision))
    save_decoder(folder / "runs/decoder/decoder.safetensors", Emu3(recipe.model))
    small = {"prompts": 20, "samples": 3, "rounds": 1}
    words = [*MODEL, "train.steps=2", "train.micro_batch_size=2", "data.batch_size=2"]
    (folder / "out").mkdir()
    return tune_dpo.run(folder, folder / "out", Clock(), overrides=words, **small), folder / "out"


def test_what_is_measured_is_numbers_of_both_sides(tuned):
    metrics, out = tuned
    for name in ("digit", "color"):
        for when in ("before", "after"):
            assert 0 <= metrics[f"dpo_{name}_accuracy_{when}"] <= 1
    assert metrics["dpo_pairs"] > 0
    assert {"dpo_margin", "dpo_chosen_change", "dpo_rejected_change"} <= metrics.keys()
    with Image.open(out / "preferences.png") as image:
        assert image.width > 1000
    assert STAGES["preferences"] is tune_dpo.run


def test_no_pair_is_of_a_prompt_that_is_measured(tuned):
    asked, held_out = tune_dpo.split_captions()
    every = {caption(d, c) for d in range(len(DIGITS)) for c in range(len(COLORS))}
    assert set(asked) | set(held_out) == every
    assert len(asked) + len(held_out) == len(every)
    assert sorted(words.split()[-1] for words in held_out) == sorted([*DIGITS, *DIGITS])
    pairs = load_pairs(tuned[1] / "preferences/dpo.safetensors")
    assert set(pairs.prompts) <= set(asked)


def test_the_second_voter_prefers_the_digit_of_the_caption():
    """On real digits that it never saw."""
    digits = load_split(0.25)[1]
    digits = digits[torch.arange(0, len(digits), 5)]
    colors = torch.arange(len(digits)) % len(COLORS)
    images = (render(digits.scans, colors, at_rest(len(digits)), 48) + 1) / 2
    said = [caption(int(d), int(c)) for d, c in zip(digits.labels, colors, strict=True)]
    wrong = [caption((int(d) + 1) % 10, int(c)) for d, c in zip(digits.labels, colors, strict=True)]
    right = strokes(images, said) > strokes(images, wrong)
    assert right.float().mean() > 0.95
