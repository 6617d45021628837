"""Clips of moving digits: rendering, judges, documents and the demo on the smallest shapes."""

import json
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from PIL import Image

from emu3.config import BYTE_VOCABULARY
from emu3.data.documents import collate
from emu3.data.media import write_image
from emu3.demo import judge, run, run_moving
from emu3.demo.config import ClipRecipe, ClipSettings, DigitSettings
from emu3.demo.digits import BACKGROUND, COLORS, DIGITS, PALETTE, caption, load_split
from emu3.demo.judge import NO_DIRECTION, DigitJudge, judge_direction
from emu3.demo.moving import (
    DIRECTIONS,
    WHICH_COLOR,
    WHICH_DIGIT,
    WHICH_DIRECTION,
    Shown,
    render_clips,
    sample_colors,
)
from emu3.demo.moving_stream import (
    MovingDocumentStream,
    MovingStream,
    clip_example,
    encoded,
    question_example,
)
from emu3.demo.stages import decoder_stage, vision_stage
from emu3.demo.stream import training_digits
from emu3.prompt import Clip, parse_document
from emu3.settings import SettingsError
from emu3.tasks import load_recipe
from emu3.templates import Turn, chat_prompt
from emu3.text import ByteTokenizer
from emu3.train import objective
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_vision
from tests.train.recipes import DECODER_WORDS, VISION_WORDS

TEXT = ByteTokenizer(BYTE_VOCABULARY)
SETTINGS = ClipSettings()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The decoder's recipe, on an untrained tokenizer of clips."""
    path = tmp_path_factory.mktemp("clips") / "vision.safetensors"
    torch.manual_seed(0)
    save_vision(path, VisionTokenizer(load_recipe("clips-vision", VISION_WORDS).vision))
    return load_recipe("clips", [*DECODER_WORDS, f'data.tokenizer="{path}"', "clips.encoded=30"])


def film(count: int, settings: ClipSettings = SETTINGS, size: int = 48):
    """Clips of validation digits in every direction."""
    digits = load_split(0.25)[1]
    digits = digits[torch.linspace(0, len(digits) - 1, count).long()]
    directions = torch.arange(count) % len(DIRECTIONS)
    colors = torch.arange(count) % len(COLORS)
    clips = render_clips(digits.scans, colors, directions, settings, size)
    return clips, Shown(digits.labels, colors, directions)


@pytest.mark.parametrize("frames", [4, 8, 12])
def test_a_clip_is_judged_to_move_where_its_caption_says(frames):
    clips, shown = film(80, ClipSettings(frames=frames))
    assert clips.shape == (80, frames, 3, 48, 48)
    assert judge_direction(clips).equal(shown.directions)
    assert judge_direction(clips.flip(1)).equal(shown.directions ^ 1)  # left, right; up, down


def test_a_clip_that_is_still_or_moves_diagonally_has_no_direction():
    clips, _ = film(8)
    still = clips[:, :1].expand_as(clips)
    assert (judge_direction(still) == NO_DIRECTION).all()
    across = torch.stack([frame.roll((n, n), (2, 3)) for n, frame in enumerate(still.unbind(1))], 1)
    assert (judge_direction(across) == NO_DIRECTION).all()
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    assert (judge_direction(still + 0.05 * noise) == NO_DIRECTION).all()


def test_the_judge_knows_validation_digits_wherever_they_move():
    clips, shown = film(100)
    knows = DigitJudge(load_split(0.25)[0], DigitSettings(), 48, SETTINGS.side)
    assert (knows.of_clips(clips) == shown.digits).double().mean() > 0.96


def test_the_first_frame_does_not_tell_the_direction():
    scans, one = load_split(0.25)[1].scans[:1], torch.zeros(1, dtype=torch.int64)
    clips = [render_clips(scans, one, torch.tensor([way]), SETTINGS, 32) for way in range(4)]
    assert all(clip[:, 0].equal(clips[0][:, 0]) for clip in clips)
    assert not any(clip[:, 1].equal(clips[0][:, 1]) for clip in clips[1:])


def test_a_digit_moves_its_share_of_the_frame_in_a_clips_time_and_stays_inside():
    full = torch.ones(4, 1, 8, 8)
    settings = ClipSettings(frames=8, travel=0.25)
    clips = render_clips(full, torch.zeros(4).long(), torch.arange(4), settings, 64)
    ink = clips[:, :, 0] > (BACKGROUND[0] + PALETTE["red"][0]) / 255 - 1  # more ink than ground
    left, top = ink.any(2).int().argmax(2), ink.any(3).int().argmax(2)
    assert left[0].tolist() == [16 - 2 * n for n in range(8)]  # 16 pixels in 8 frames
    assert left[1].tolist() == [16 + 2 * n for n in range(8)]
    assert top[2].tolist() == [16 - 2 * n for n in range(8)]
    assert top[3].tolist() == [16 + 2 * n for n in range(8)]
    assert (ink.sum((2, 3)) == 32 * 32 - 4).all()  # the corners are round


def test_clips_have_colours_spread_over_the_palette():
    found = sample_colors(200, ClipSettings(colors=4), torch.Generator().manual_seed(0))
    assert found.unique().tolist() == [0, 2, 4, 6]
    found = sample_colors(200, ClipSettings(colors=8), torch.Generator().manual_seed(0))
    assert found.unique().tolist() == list(range(len(COLORS)))


def test_captions_and_answers_say_what_is_shown():
    shown = Shown(torch.tensor([7]), torch.tensor([1]), torch.tensor([2]))
    assert shown.caption(0) == f"{caption(7, 1)} moves up" == "an orange seven moves up"
    answers = [shown.answer(0, question) for question in shown.questions]
    assert answers == ["seven", "orange", "up"]
    assert WHICH_DIRECTION not in Shown(shown.digits, shown.colors).questions


def test_a_clip_document_is_that_of_the_clip_page_and_is_trained_after_its_opening():
    ids, codes = BYTE_VOCABULARY, torch.arange(8).view(2, 2, 2)
    example = clip_example("a red one moves up", Clip(codes, Fraction(8)), TEXT)
    rows = [[ids.visual_start + code for code in row] for row in codes.flatten(0, 1).tolist()]
    frames = [
        [*rows[0], ids.eol, *rows[1], ids.eol, ids.eof],
        [*rows[2], ids.eol, *rows[3], ids.eol, ids.eof],
    ]
    opening = [
        ids.bos,
        *TEXT.encode("a red one moves up"),
        ids.boi,
        *TEXT.encode("2*2, 8 fps, 1 s"),
        ids.img_token,
    ]
    assert example.ids == [*opening, *frames[0], *frames[1], ids.eoi, ids.eos]
    assert example.start == len(opening)


def test_questions_are_asked_as_emu3_chat_asks_them_and_only_the_answers_are_trained():
    ids, codes = BYTE_VOCABULARY, torch.zeros(1, 2, dtype=torch.int64)
    asked, answers = (WHICH_DIGIT, WHICH_COLOR), ("seven", "red")
    example = question_example(codes, asked, answers, TEXT)
    turns = [Turn([codes, WHICH_DIGIT], "seven"), Turn([WHICH_COLOR])]
    assert example.ids == [*chat_prompt(turns, TEXT), *TEXT.encode(" red"), ids.eos]
    tokens, weights = collate([example], ids, 0.5)
    learned = tokens[weights > 0].tolist()
    assert learned == [*TEXT.encode(" seven"), *TEXT.encode(" red"), ids.eos]


def test_the_streams_questions_are_one_or_two_different_ones_with_their_answers(recipe):
    settings = ClipSettings(share=0.0, questions=1.0, encoded=30)
    stream = MovingDocumentStream(
        training_digits(recipe.data),
        recipe.model_copy(update={"clips": settings}),
        load_vision(recipe.data.tokenizer),
        ByteTokenizer(recipe.model.vocabulary),
    )
    answers = {WHICH_DIGIT: DIGITS, WHICH_COLOR: COLORS, WHICH_DIRECTION: DIRECTIONS}
    seen = set()
    for _ in range(16):
        for row in stream.next_batch()[0].tolist():
            *_, words = parse_document(row, TEXT)
            said = [turn.split(". ASSISTANT: ") for turn in words.split(" USER: ")]
            assert all(answer in answers[question] for question, answer in said)
            seen.add(tuple(question for question, _ in said))
    assert seen == {(one,) for one in answers} | set(permutations(answers, 2))


def test_the_streams_documents_hold_the_codes_and_words_of_its_clips(recipe):
    tokenizer = load_vision(recipe.data.tokenizer)
    text = ByteTokenizer(recipe.model.vocabulary)
    settings = ClipSettings(share=1.0, questions=0.0, encoded=70, null_caption=0.5)
    recipe = recipe.model_copy(update={"clips": settings})  # more than are encoded at once
    digits = training_digits(recipe.data)
    stream = MovingDocumentStream(digits, recipe, tokenizer, text)
    tokens, weights = stream.next_batch()
    again = MovingDocumentStream(digits, recipe, tokenizer, text)
    torch.rand((), generator=again.generator)
    index = torch.randint(70, (len(tokens),), generator=again.generator)
    silent = set()
    for number, which in enumerate(index.tolist()):
        *words, found = parse_document(tokens[number].tolist(), text)
        silent.add(not words)
        assert words in ([stream.shown.caption(which)], [])
        assert found.codes.equal(again.clips[which].codes)
        assert found.fps == 8
        assert (weights[number] == recipe.train.vision_weight).sum() == found.codes.numel()
    assert silent == {True, False}


def test_each_frame_of_codes_is_that_of_its_four_frames_alone(recipe):
    tokenizer = load_vision(recipe.data.tokenizer)
    clips = film(2, size=16)[0]
    for clip, pixels in zip(encoded(clips, recipe, tokenizer), clips, strict=True):
        pieces = pixels.unflatten(0, (-1, 4))
        assert clip.codes.equal(torch.cat([tokenizer.encode(p[None])[0] for p in pieces]))


def test_the_first_documents_are_images_and_captions_alone(recipe):
    settings = ClipSettings(after=2, share=1.0, questions=0.0, encoded=30)
    stream = MovingDocumentStream(
        training_digits(recipe.data),
        recipe.model_copy(update={"clips": settings}),
        load_vision(recipe.data.tokenizer),
        ByteTokenizer(recipe.model.vocabulary),
    )
    stream.next_batch()
    again = MovingDocumentStream(stream.digits, stream.recipe, stream.tokenizer, stream.text)
    again.restore(stream.state())
    for clips in (False, True):
        for row in again.next_batch()[0].tolist():
            parts = parse_document(row, TEXT)
            assert any(isinstance(part, Clip) for part in parts) == clips


@pytest.mark.parametrize("kind", [MovingStream, MovingDocumentStream])
def test_a_restored_stream_of_clips_goes_on_where_it_stood(kind, recipe):
    digits = training_digits(recipe.data)
    text = ByteTokenizer(recipe.model.vocabulary)
    more = (load_vision(recipe.data.tokenizer), text) if kind is MovingDocumentStream else ()
    stream, other = (kind(digits, recipe, *more) for _ in range(2))
    for _ in range(5):
        stream.next_batch()
    other.restore(stream.state())
    for _ in range(3):
        for one, two in zip(stream.next_batch(), other.next_batch(), strict=True):
            assert one.equal(two)


def test_images_and_clips_share_a_loss_and_an_update_of_the_codebook():
    stage = vision_stage(load_recipe("clips-vision", VISION_WORDS))
    model, (images, clips) = stage.model.eval(), stage.stream.next_batch()
    assert clips.shape[1:] == (4, 3, 16, 16)
    both, _ = objective.reconstruction(model, images, clips)
    each = [objective.reconstruction(model, pixels)[0] for pixels in (images, clips)]
    torch.testing.assert_close(both, sum(each) / 2)
    updates = []
    model.train().quantize._update_codebook = lambda: updates.append(len(model.quantize._seen))
    stage.step(0, images, clips)
    assert updates == [2]


@pytest.mark.parametrize(
    ("name", "word", "line"),
    [
        ("clips", "clips.frames=6", r"clips.frames \(6\) must be a multiple of temporal_factor"),
        ("clips", "clips.frames=4", r"clips.frames \(4\) must be .*, and 8 at least, to be cont"),
        ("clips", "clips.questions=0.6", r"clips.share .* must be at most 1 together"),
        (
            "clips",
            "clips.speed=1",
            r"^clips.speed: unknown setting; clips has after, ",
        ),
        ("digits", "clips.share=0.2", r"vision.temporal_factor must be above 1 for clips, got 1"),
    ],
)
def test_a_setting_that_makes_no_clip_is_refused_in_a_line(name, word, line):
    with pytest.raises(SettingsError, match=line) as fault:
        load_recipe(name, [word])
    assert "\n" not in str(fault.value)


def test_a_tokenizer_of_images_and_too_few_positions_are_refused(recipe, tmp_path):
    words = [*DECODER_WORDS, f'data.tokenizer="{recipe.data.tokenizer}"']
    with pytest.raises(ValueError, match=r"must be \d+ at least, for a question and 3 x 4 x 4 cod"):
        decoder_stage(load_recipe("clips", [*words, "model.max_position_embeddings=80"]))
    path = tmp_path / "images.safetensors"
    save_vision(path, VisionTokenizer(load_recipe("vision", VISION_WORDS).vision))
    with pytest.raises(ValueError, match=r"has a temporal_factor of 1, the recipe 4"):
        decoder_stage(load_recipe("clips", [*DECODER_WORDS, f'data.tokenizer="{path}"']))


@pytest.mark.e2e
def test_the_demo_shows_and_measures_clips_and_answers(tmp_path, monkeypatch):
    """With fewer images, scans and rows; the plots of images, which take most of it, are black."""
    monkeypatch.setattr(run, "_ROUNDS", 1)
    monkeypatch.setattr(judge, "_MOVED_COPIES", 0)
    monkeypatch.setattr(run_moving, "_SHOWN", 4)
    monkeypatch.setattr(run_moving, "_CONTINUED", 2)
    black = torch.zeros(3, 8, 8).byte()
    for name in ("draw_grid", "draw_reconstructions", "draw_captions", "draw_curves"):
        monkeypatch.setattr(run.plots, name, lambda path, *_: write_image(path, black))
    few = "data.validation=0.02"
    decoder = [*DECODER_WORDS, few, "clips.encoded=30"]
    vision = [*VISION_WORDS, few, "clips.batch_size=4"]
    report = run.run_demo(tmp_path, vision, decoder, video=True)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for name in (
        "clip_digit_accuracy",
        "clip_direction_accuracy",
        "continued_direction_accuracy",
        "answer_accuracy",
        "caption_digit_accuracy",
    ):
        assert 0 <= report[name] <= 1
    assert report["judge_clip_direction_accuracy"] == 1
    assert report["generated_clips"] == 320
    assert report["continued_clips"] == report["validation_digits"]
    with Image.open(tmp_path / "clips.gif") as film:
        assert film.n_frames == 12
    for name in ("clips", "continued"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.width >= 1000
    assert isinstance(load_recipe("clips"), ClipRecipe)
