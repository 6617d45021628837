"""The texts around what a user says: Emu3's own, letter by letter.

A prompt to generate is ``BOS caption boi "h*w" img_token``; Emu3-Gen was trained to answer captions
that end in ``POSITIVE``, beside ``NEGATIVE`` as the negative prompt. A question is ``BOS You are a
helpful assistant. USER: {image}{text}. ASSISTANT:``, whose full stop follows the text whatever it
ends in.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from emu3.prompt import Part, content_ids
from emu3.text import TextTokenizer
from emu3.vision.images import FACTOR, WIDEST_ASPECT

POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
DESCRIBE = "Please describe the image"
SYSTEM = "You are a helpful assistant. "


@dataclass(frozen=True)
class Turn:
    """What a user said, and what was answered; None is still to be answered."""

    said: Sequence[Part]
    """Images and clips stand where they are meant: before the text in Emu3's own prompts."""
    answer: str | None = None


def grid_of(ratio: str = "1:1", area: int = 720 * 720, factor: int = FACTOR) -> tuple[int, int]:
    """Rows and columns of codes of an image with the aspect ratio ``"width:height"``.

    Args:
        ratio: two positive integers.
        area: pixels, about.
        factor: pixels a side of a code.

    Raises:
        ValueError: one line, if the ratio is no ratio or beyond 5, or the area has no code.
    """
    sides = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", ratio)
    if sides is None:
        raise ValueError(f'ratio must be "width:height" in positive integers, got {ratio!r}')
    width, height = map(int, sides.groups())
    if max(width, height) > WIDEST_ASPECT * min(width, height):
        raise ValueError(f"ratio must be {WIDEST_ASPECT} at most, got {ratio}")
    unit = sqrt(area / (width * height)) if area > 0 else 0.0
    grid = round(height * unit / factor), round(width * unit / factor)
    if min(grid) < 1:
        raise ValueError(f"area must be {factor * factor} pixels at least at {ratio}, got {area}")
    return grid


def chat_prompt(turns: Sequence[Turn], text: TextTokenizer, system: str = SYSTEM) -> list[int]:
    """``BOS system USER: {said}. ASSISTANT:`` and, of earlier turns, `` {answer}`` and a space.

    Emu3 was released with one turn; further ones follow Hugging Face's template.

    Raises:
        ValueError: no turn, nothing said, or an answer missing before the last turn.
    """
    if not turns:
        raise ValueError("chat: something must be said, got no turn")
    parts: list[Part] = [system]
    for number, turn in enumerate(turns, 1):
        if not any(not isinstance(part, str) or part.strip() for part in turn.said):
            raise ValueError("chat: something must be said, got an empty prompt")
        parts += ["USER: ", *turn.said, ". ASSISTANT:"]
        if (turn.answer is None) != (number == len(turns)):
            raise ValueError(f"chat: all turns but the last must be answered, got turn {number}")
        if turn.answer is not None:
            parts.append(f" {turn.answer.strip()} ")
    return [text.vocabulary.bos, *content_ids(parts, text)]
