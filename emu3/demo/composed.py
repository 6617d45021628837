"""Images of one to three handwritten digits, one above the other, with captions and questions.

A digit fills a square of the size of the miniature's images, so that an image is one to three
squares high; in some of the higher ones a square is empty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import BACKGROUND, COLORS, DIGITS, Digits, caption, render, sample_motion

PLACES = {1: ("which",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
"""What a question calls the squares of an image, by their number."""
HOW_MANY = "how many digits?"
_NUMBERS = "one", "two", "three"
_EMPTY = 1 / 3
"""Share of the images of several squares in which one is empty."""


class Question(NamedTuple):
    """What is asked about an image, and the answer."""

    kind: str
    """``count``, ``digit`` or ``color``."""
    words: str
    answer: str


class Composed(NamedTuple):
    """An image ``[3, n S, S]`` in [-1, 1] of ``n`` squares, and what they show, from the top."""

    image: Tensor
    squares: Sequence[tuple[int, int] | None]
    """Digit and index into ``COLORS`` of each; None where it is empty."""

    def caption(self, order: Sequence[int] | None = None) -> str:
        """As "two digits: bottom a blue one, top a red seven", or "one digit: a red seven".

        Args:
            order: of the squares in it; from the top where None.
        """
        places = PLACES[len(self.squares)]
        shown = [
            f"{places[at]} {caption(*square)}" if len(places) > 1 else caption(*square)
            for at in order or range(len(places))
            if (square := self.squares[at])
        ]
        plural = "s" if len(shown) > 1 else ""
        return f"{_NUMBERS[len(shown) - 1]} digit{plural}: {', '.join(shown)}"

    def questions(self) -> list[Question]:
        """How many digits there are, and the digit and the colour of each."""
        count = sum(square is not None for square in self.squares)
        found = [Question("count", HOW_MANY, _NUMBERS[count - 1])]
        for place, square in zip(PLACES[len(self.squares)], self.squares, strict=True):
            if square:
                digit, color = square
                found.append(Question("digit", f"{place} digit?", DIGITS[digit]))
                found.append(Question("color", f"{place} colour?", COLORS[color]))
        return found


def compose(
    digits: Digits, settings: DigitSettings, count: int, size: int, generator: torch.Generator
) -> list[Composed]:
    """Draw ``count`` images: as many of one square as of two and three.

    Args:
        settings: of the motion of each digit.
        size: side of a square.
    """
    heights = torch.randint(1, len(PLACES) + 1, (count,), generator=generator)
    total = int(heights.sum())
    which = torch.randint(len(digits), (total,), generator=generator)
    colors = torch.randint(len(COLORS), (total,), generator=generator)
    motion = sample_motion(total, settings, generator)
    drawn = render(digits.scans[which], colors, motion, size)
    shown = list(zip(digits.labels[which].tolist(), colors.tolist(), strict=True))
    ground = torch.tensor(BACKGROUND).view(3, 1, 1) / 127.5 - 1
    composed, first = [], 0
    for height in heights.tolist():
        image, squares = drawn[first : first + height], shown[first : first + height]
        first += height
        if height > 1 and torch.rand((), generator=generator) < _EMPTY:
            empty = int(torch.randint(height, (), generator=generator))
            image[empty], squares[empty] = ground, None
        composed.append(Composed(image.transpose(0, 1).flatten(1, 2), squares))
    return composed
