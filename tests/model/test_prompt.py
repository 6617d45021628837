"""The token grammar, built and read back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu3.config import BYTE_VOCABULARY, EMU3_VOCABULARY
from emu3.prompt import (
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
    parsed = parse_document(generation_document(caption, codes, text), text)
    assert (parsed.before, parsed.after) == (caption, "")
    assert parsed.codes.equal(codes)
    described = parse_document(understanding_document(codes, caption, text), text)
    assert (described.before, described.after) == ("", caption)
    assert described.codes.equal(codes)


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


def test_forced_tokens_agree_with_the_document():
    codes = torch.arange(6).view(2, 3)
    document = [*generation_document("x", codes, TEXT), BYTE_VOCABULARY.pad]
    start = document.index(BYTE_VOCABULARY.img_token)
    for offset, token in enumerate(document[start + 1 :], 1):
        forced = forced_token(offset, (2, 3), BYTE_VOCABULARY)
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
        (DOCUMENT[:3], r"no boi \(262\)"),
        (edit(DOCUMENT, IMG - 2, ord("x")), 'the size after boi must be "h\\*w"'),
        (edit(DOCUMENT, IMG + 1, 7), f"a visual token must be at position {IMG + 1}, got 7"),
        (edit(DOCUMENT, IMG + 3, 264), rf"EOL \(257\) must be at position {IMG + 3}, got 264"),
        (DOCUMENT[: IMG + 5], f"a visual token must be at position {IMG + 5}, got None"),
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
    with pytest.raises(ValueError, match="ids must be bytes, got 256"):
        TEXT.decode([65, 256])
