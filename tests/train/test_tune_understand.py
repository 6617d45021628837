"""Questions about composed images: what is asked, and the commands of the miniature's tuning."""

import pytest
import torch

from emu3.config import load_recipe
from emu3.demo.composed import HOW_MANY, compose
from emu3.demo.config import DigitRecipe, DigitSettings
from emu3.demo.digits import COLORS, DIGITS, load_split
from emu3.demo.judge import DigitJudge, judge_color
from emu3.demo.miniature import Clock
from emu3.demo.tune_understand import measure_answers, run, text_loss
from emu3.model import Emu3
from emu3.text import ByteTokenizer
from emu3.vision import VisionTokenizer
from emu3.weights import save_decoder, save_vision


@pytest.fixture(scope="module")
def composed():
    generator = torch.Generator().manual_seed(0)
    return compose(load_split(0.25)[1], DigitSettings(), 60, 48, generator)


def test_an_image_shows_the_digits_that_are_asked_about(composed):
    """As the demo's judges see them, which were fitted on other digits."""
    judge = DigitJudge(load_split(0.25)[0], DigitSettings(), 48)
    right = {"digit": [], "color": []}
    for image, squares in composed:
        parts = image.unflatten(1, (len(squares), 48)).transpose(0, 1)
        for part, square in zip(parts, squares, strict=True):
            if square is None:
                assert part.amin((1, 2)).equal(part.amax((1, 2)))
                continue
            right["digit"].append(int(judge(part[None])) == square[0])
            right["color"].append(int(judge_color(part[None])) == square[1])
    assert sum(right["digit"]) / len(right["digit"]) > 0.95
    assert sum(right["color"]) / len(right["color"]) > 0.97


def test_the_size_of_an_image_does_not_say_how_many_digits_it_shows(composed):
    heights = [len(squares) for _, squares in composed]
    assert min(map(heights.count, (1, 2, 3))) >= 10
    for height in 2, 3:
        empty = [squares.count(None) for _, squares in composed if len(squares) == height]
        assert set(empty) == {0, 1}


def test_questions_have_the_answers_of_the_caption(composed):
    for image in composed:
        caption = image.caption()
        count, *others = image.questions()
        assert count.words == HOW_MANY
        assert caption.startswith(f"{count.answer} digit")
        words = caption.split(": ")[1].split(", ")
        assert len(words) == ["one", "two", "three"].index(count.answer) + 1
        for said, digit, color in zip(words, others[::2], others[1::2], strict=True):
            assert said.split()[-2:] == [color.answer, digit.answer]
            assert digit.answer in DIGITS
            assert color.answer in COLORS
            place = digit.words.removesuffix(" digit?")
            assert color.words == f"{place} colour?"
            assert said.startswith(place) == (len(image.squares) > 1)
        assert len({one.words for one in others}) == len(others)


@pytest.mark.e2e
def test_the_tuning_of_a_miniature_reports_what_it_reaches(tmp_path):
    """Two steps of each stage, from random weights; every number is there."""
    recipe = load_recipe("digits", (), DigitRecipe)
    torch.manual_seed(0)
    runs = tmp_path / "start" / "runs"
    save_vision(runs / "vision/vision.safetensors", VisionTokenizer(recipe.vision))
    save_decoder(runs / "decoder/decoder.safetensors", Emu3(recipe.model))
    clock = Clock()
    how = {"overrides": ["train.steps=2"], "images": 24, "asked": 3}
    metrics = run(tmp_path / "start", tmp_path / "out", clock, **how)
    kinds = "", "count_", "digit_", "color_"
    names = {f"{prefix}answer_{kind}accuracy" for prefix in ("", "lora_") for kind in kinds}
    assert metrics.keys() == names | {
        f"text_loss_{when}" for when in ("before", "between", "after")
    }
    assert metrics["text_loss_before"] == pytest.approx(6.7, abs=0.5)  # of 776 ids
    assert (tmp_path / "out/questions.png").stat().st_size > 0
    assert (tmp_path / "out/runs/understand2-lora/adapter/adapter_config.json").is_file()
    assert clock.seconds.keys() >= {"train_understand1", "train_understand2-lora"}


def test_answers_are_right_when_they_are_the_ones_expected(composed, monkeypatch):
    """Whitespace around an answer does not count."""
    text = ByteTokenizer(load_recipe("digits", (), DigitRecipe).model.vocabulary)
    asked = [one for image in composed for one in image.questions()]
    answers = iter([f" {one.answer} " if one.kind != "count" else "four" for one in asked])
    monkeypatch.setattr(
        "emu3.demo.tune_understand.generate_text",
        lambda model, text, prompts, most: [next(answers) for _ in prompts],
    )
    codes = [torch.zeros(18, 6, dtype=torch.int64)] * 60
    found = measure_answers(None, text, composed, codes)
    assert (found["answer_digit_accuracy"], found["answer_count_accuracy"]) == (1.0, 0.0)
    assert found["answer_accuracy"] == pytest.approx(1 - 60 / len(asked))


def test_the_loss_of_texts_is_of_every_token_once(tmp_path):
    from emu3.data.store import Store
    from tests.train.stores import text_document, write_store

    write_store(tmp_path, [text_document(300, 0), text_document(180, 1)])
    torch.manual_seed(0)
    model = Emu3(load_recipe("digits", (), DigitRecipe).model).eval()
    torch.nn.init.zeros_(model.head.weight)
    assert Store(tmp_path).tokens == 480
    expected = torch.tensor(float(model.settings.vocabulary.size)).log()
    assert text_loss(model, tmp_path) == pytest.approx(expected.item(), rel=1e-5)
