"""The token grammar, built and read back."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu3.config import BYTE_VOCABULARY, EMU3_VOCABULARY
from emu3.prompt import (
    Clip,
    clip_ids,
    clip_prompt,
    document,
    forced_token,
    generation_document,
    generation_prompt,
    image_ids,
    parse_document,
    understanding_document,
    understanding_prompt,
)
from emu3.text import ByteTokenizer

TEXT = ByteTokenizer(BYTE_VOCABULARY)
OFFICIAL = ByteTokenizer(EMU3_VOCABULARY)


@st.composite
def images(draw):
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    codes = st.integers(0, BYTE_VOCABULARY.num_visual - 1)
    flat = draw(st.lists(codes, min_size=height * width, max_size=height * width))
    return torch.tensor(flat).view(height, width)


@given(caption=st.text(max_size=12), codes=images(), text=st.sampled_from([TEXT, OFFICIAL]))
def test_documents_read_back_as_they_were_built(caption, codes, text):
    words = [caption] if caption else []
    assert_same(parse_document(generation_document(caption, codes, text), text), [*words, codes])
    assert_same(parse_document(understanding_document(codes, caption, text), text), [codes, *words])


RATES = st.sampled_from([Fraction(24), Fraction(12), Fraction(30000, 1001), Fraction(25, 2)])


@st.composite
def clips(draw):
    frames = [draw(images())]
    for _ in range(draw(st.integers(0, 30))):
        frames.append(frames[0].flip(0))
    return Clip(torch.stack(frames), draw(RATES), draw(st.sampled_from([1, 4])))


@given(parts=st.lists(st.one_of(st.text(min_size=1, max_size=6), images(), clips()), max_size=5))
def test_text_images_and_clips_in_any_order_read_back(parts):
    """Adjacent texts come back as one; a frame rate to three decimals."""
    span = next((part.span for part in parts if isinstance(part, Clip)), 4)
    parts = [replace(part, span=span) if isinstance(part, Clip) else part for part in parts]
    expected = []
    for part in parts:
        if isinstance(part, str) and expected and isinstance(expected[-1], str):
            expected[-1] += part
        else:
            expected.append(part)
    assert_same(parse_document(document(parts, TEXT), TEXT, span), expected)


def assert_same(parts, expected):
    assert len(parts) == len(expected)
    for part, other in zip(parts, expected, strict=True):
        if isinstance(other, Clip):
            assert part.codes.equal(other.codes)
            assert abs(part.fps - other.fps) <= Fraction(1, 2000)
        elif isinstance(other, str):
            assert part == other
        else:
            assert part.equal(other)


def test_a_clip_tells_its_size_rate_and_duration_in_plain_text():
    codes = torch.arange(12).view(3, 2, 2)
    ids = clip_ids(Clip(codes, Fraction(24)), OFFICIAL)
    meta = OFFICIAL.encode("2*2, 24 fps, 0.5 s")
    assert ids[: len(meta) + 2] == [151852, *meta, 151851]
    frame = [151854, 151855, 151846, 151856, 151857, 151846, 151847]
    assert ids[len(meta) + 2 :][:7] == frame
    assert ids[-2:] == [151847, 151853]
    assert len(ids) == 2 + len(meta) + 3 * 7 + 1


def test_five_seconds_of_512_square_video_fit_into_the_context():
    codes = torch.zeros(30, 64, 64, dtype=torch.int64)
    ids = clip_ids(Clip(codes, Fraction(24)), OFFICIAL)
    assert len(ids) - len(clip_prompt((64, 64), 30, Fraction(24), OFFICIAL)) == 124_830 + 1


def test_a_generation_document_in_the_official_ids():
    codes = torch.tensor([[0, 1], [2, 32767]])
    assert generation_document("", codes, OFFICIAL) == [
        *(151849, 151852, *OFFICIAL.encode("2*2"), 151851),
        *(151854, 151855, 151846),
        *(151856, 184621, 151846),
        *(151847, 151853, 151850),
    ]


def test_prompts_are_the_beginnings_of_their_documents():
    codes = torch.arange(6).view(2, 3)
    prompt = generation_prompt("a red one", (2, 3), TEXT)
    assert generation_document("a red one", codes, TEXT)[: len(prompt)] == prompt
    prompt = understanding_prompt(codes, TEXT)
    assert understanding_document(codes, "a red one", TEXT)[: len(prompt)] == prompt


def test_a_720_square_image_takes_8193_tokens():
    grid = 90, 90
    prompt = len(generation_prompt("", grid, OFFICIAL))
    document = generation_document("", torch.zeros(grid, dtype=torch.int64), OFFICIAL)
    assert len(document) - prompt == 8193


@pytest.mark.parametrize("frames", [None, 1, 3])
def test_forced_tokens_agree_with_the_document(frames):
    codes = torch.arange(6).view(2, 3)
    clip = None if frames is None else Clip(codes.repeat(frames, 1, 1), Fraction(8))
    ids = [*document(["x", codes if clip is None else clip], TEXT), BYTE_VOCABULARY.pad]
    start = ids.index(BYTE_VOCABULARY.img_token)
    for offset, token in enumerate(ids[start + 1 :], 1):
        forced = forced_token(offset, (2, 3), BYTE_VOCABULARY, frames or 1)
        visual = token >= BYTE_VOCABULARY.visual_start
        assert forced == (None if visual else token)


def edit(ids, at, token):
    return [*ids[:at], token, *ids[at + 1 :]]


DOCUMENT = generation_document("one", torch.zeros(2, 2, dtype=torch.int64), TEXT)
IMG = DOCUMENT.index(BYTE_VOCABULARY.img_token)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"BOS \(259\) must be at position 0, got None"),
        (edit(DOCUMENT, 2, 300), "text must be at position 2, got 300"),
        (edit(DOCUMENT, IMG, 50), r"no img_token \(261\)"),
        (
            edit(DOCUMENT, IMG - 2, ord("x")),
            'the size after boi must be "h\\*w" or "h\\*w, fps fps,',
        ),
        (edit(DOCUMENT, IMG + 1, 7), f"a visual token must be at position {IMG + 1}, got 7"),
        (edit(DOCUMENT, IMG + 3, 264), rf"EOL \(257\) must be at position {IMG + 3}, got 264"),
        ([*DOCUMENT[: IMG + 5], 260], f"a visual token must be at position {IMG + 5}, got 260"),
        ([*DOCUMENT[:-2], 260], rf"eoi \(263\) must be at position {len(DOCUMENT) - 2}, got 260"),
        (DOCUMENT[:-1], r"no EOS \(260\)"),
    ],
)
def test_a_broken_document_says_where_it_breaks(ids, message):
    with pytest.raises(ValueError, match=message):
        parse_document(ids, TEXT)


@pytest.mark.parametrize(
    "codes", [torch.tensor([[512]]), torch.tensor([[-1]]), torch.zeros(0, 2), torch.zeros(4)]
)
def test_codes_that_are_no_image_are_refused(codes):
    with pytest.raises(ValueError, match="prompt: codes must"):
        image_ids(codes, TEXT)


def test_bytes_cover_every_string_and_only_bytes_decode():
    assert TEXT.decode(TEXT.encode("zwölf 七")) == "zwölf 七"
    assert TEXT.decode([0xFF]) == "\ufffd"
    with pytest.raises(ValueError, match=r"must be in \[0, 256\), got 256"):
        TEXT.decode([65, 256])
