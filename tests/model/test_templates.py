"""Emu3's own prompts, letter by letter, and what they refuse."""

import pytest
import torch

from emu3.config import EMU3_VOCABULARY
from emu3.prompt import image_ids
from emu3.templates import Turn, chat_prompt, grid_of
from emu3.text import ByteTokenizer

TEXT = ByteTokenizer(EMU3_VOCABULARY)
CODES = torch.arange(6).view(2, 3)
IMAGE = image_ids(CODES, TEXT)
BOS = EMU3_VOCABULARY.bos


def test_a_question_about_an_image():
    """The full stop follows the text whatever it ends in, as in the official code."""
    ids = chat_prompt([Turn([CODES, "What is this?"])], TEXT)
    before = TEXT.encode("You are a helpful assistant. USER: ")
    assert ids == [BOS, *before, *IMAGE, *TEXT.encode("What is this?. ASSISTANT:")]


def test_text_alone_is_encoded_as_one_string():
    ids = chat_prompt([Turn(["Hello", " you"])], TEXT)
    whole = "You are a helpful assistant. USER: Hello you. ASSISTANT:"
    assert ids == [BOS, *TEXT.encode(whole)]


def test_images_stand_where_they_are_meant_and_turns_follow_each_other():
    turns = [Turn([CODES, "one ", CODES, " two"], "Both."), Turn(["and now"])]
    before = TEXT.encode("You are a helpful assistant. USER: ")
    rest = " two. ASSISTANT: Both. USER: and now. ASSISTANT:"
    expected = [BOS, *before, *IMAGE, *TEXT.encode("one "), *IMAGE, *TEXT.encode(rest)]
    assert chat_prompt(turns, TEXT) == expected


@pytest.mark.parametrize(
    ("turns", "line"),
    [
        ([], "got no turn"),
        ([Turn([])], "got an empty prompt"),
        ([Turn(["  "])], "got an empty prompt"),
        ([Turn(["a"]), Turn(["b"])], "all turns but the last must be answered, got turn 1"),
        ([Turn(["a"], "b")], "all turns but the last must be answered, got turn 1"),
    ],
)
def test_a_chat_that_asks_nothing_is_refused(turns, line):
    with pytest.raises(ValueError, match=line):
        chat_prompt(turns, TEXT)


@pytest.mark.parametrize(
    ("ratio", "area", "grid"),
    [
        ("1:1", 720 * 720, (90, 90)),
        ("16:9", 720 * 720, (68, 120)),
        ("9:16", 720 * 720, (120, 68)),
        ("1:1", 512 * 512, (64, 64)),
        ("4:3", 720 * 720, (78, 104)),
        ("5:1", 512 * 512, (29, 143)),
    ],
)
def test_the_grid_of_a_ratio_and_an_area(ratio, area, grid):
    assert grid_of(ratio, area) == grid


@pytest.mark.parametrize(
    ("ratio", "area", "line"),
    [
        ("16:3", 518400, "ratio must be 5 at most, got 16:3"),
        ("1", 518400, "ratio must be .*got '1'"),
        ("1:0", 518400, "got '1:0'"),
        ("a:b", 518400, "got 'a:b'"),
        ("1.5:1", 518400, "got '1.5:1'"),
        ("1:1", 15, "area must be 64 pixels at least at 1:1, got 15"),
        ("1:1", -4, "area must be 64 pixels at least at 1:1, got -4"),
    ],
)
def test_a_ratio_or_area_without_an_image_gives_one_line(ratio, area, line):
    with pytest.raises(ValueError, match=line):
        grid_of(ratio, area)
