"""Images of one to three handwritten digits, one above the other, with captions and questions.

A digit fills a square of the size of the miniature's images: of three squares some are empty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import BACKGROUND, COLORS, DIGITS, Digits, caption, render, sample_motion

SQUARES = ("top", "middle", "bottom")
HOW_MANY = "how many digits?"
_NUMBERS = "one", "two", "three"


class Question(NamedTuple):
    """What is asked about an image, and the answer."""

    kind: str
    """``count``, ``digit`` or ``color``."""
    words: str
    answer: str


class Composed(NamedTuple):
    """Images ``[n, 3, 3 S, S]`` in [-1, 1], and what they show."""

    images: Tensor
    digits: Tensor
    """``[n, 3]``, from the top; -1 where a square is empty."""
    colors: Tensor
    """``[n, 3]`` indices into ``COLORS``."""

    def caption(self, number: int) -> str:
        """As "two digits: a red seven, a blue one"."""
        shown = [
            caption(int(self.digits[number, at]), int(self.colors[number, at]))
            for at in self._filled(number)
        ]
        plural = "s" if len(shown) > 1 else ""
        return f"{_NUMBERS[len(shown) - 1]} digit{plural}: {', '.join(shown)}"

    def questions(self, number: int) -> list[Question]:
        """How many digits there are, and the digit and the colour of each."""
        filled = self._filled(number)
        found = [Question("count", HOW_MANY, _NUMBERS[len(filled) - 1])]
        for at in filled:
            digit, color = int(self.digits[number, at]), int(self.colors[number, at])
            found.append(Question("digit", f"{SQUARES[at]} digit?", DIGITS[digit]))
            found.append(Question("color", f"{SQUARES[at]} colour?", COLORS[color]))
        return found

    def _filled(self, number: int) -> Sequence[int]:
        return (self.digits[number] >= 0).nonzero().flatten().tolist()


def compose(
    digits: Digits, settings: DigitSettings, count: int, size: int, generator: torch.Generator
) -> Composed:
    """Draw ``count`` images: as many with one digit as with two and three, in any squares.

    Args:
        settings: of the motion of each digit.
        size: side of a square.
    """
    squares = len(SQUARES)
    how_many = torch.randint(1, squares + 1, (count, 1), generator=generator)
    order = torch.rand(count, squares, generator=generator).argsort(1)
    is_filled = order < how_many
    which = torch.randint(len(digits), (count * squares,), generator=generator)
    colors = torch.randint(len(COLORS), (count * squares,), generator=generator)
    motion = sample_motion(len(which), settings, generator)
    each = render(digits.scans[which], colors, motion, size).unflatten(0, (count, squares))
    ground = torch.tensor(BACKGROUND).view(3, 1, 1) / 127.5 - 1
    each = torch.where(is_filled[:, :, None, None, None], each, ground)
    images = each.transpose(1, 2).flatten(2, 3)
    labels = torch.where(is_filled, digits.labels[which].view(count, squares), -1)
    return Composed(images, labels, colors.view(count, squares))
