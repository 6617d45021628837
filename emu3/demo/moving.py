"""Clips of digits that move, their captions, and questions about images and clips."""

from typing import NamedTuple

import torch
from torch import Tensor

from emu3.demo.config import ClipSettings
from emu3.demo.digits import COLORS, DIGITS, caption, render

STEPS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Where a digit goes, right and down."""
DIRECTIONS = tuple(STEPS)

WHICH_DIGIT, WHICH_COLOR = "which digit?", "which colour?"
WHICH_DIRECTION = "which direction?"


class Shown(NamedTuple):
    """What a batch of images or clips shows."""

    digits: Tensor
    """``[B]``."""
    colors: Tensor
    """``[B]`` indices into ``COLORS``."""
    directions: Tensor | None = None
    """``[B]`` indices into ``DIRECTIONS``; None for images."""

    def caption(self, number: int) -> str:
        """As "a red seven", and of a clip "a red seven moves left"."""
        words = caption(int(self.digits[number]), int(self.colors[number]))
        if self.directions is None:
            return words
        return f"{words} moves {DIRECTIONS[self.directions[number]]}"

    def answer(self, number: int, question: str) -> str:
        """The answer to one of ``questions``."""
        if question == WHICH_DIRECTION:
            return DIRECTIONS[self.directions[number]]
        if question == WHICH_COLOR:
            return COLORS[self.colors[number]]
        return DIGITS[self.digits[number]]

    @property
    def questions(self) -> tuple[str, ...]:
        about_images = WHICH_DIGIT, WHICH_COLOR
        return about_images if self.directions is None else (*about_images, WHICH_DIRECTION)


def sample_directions(count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` indices into ``DIRECTIONS``."""
    return torch.randint(len(DIRECTIONS), (count,), generator=generator)


def sample_colors(count: int, settings: ClipSettings, generator: torch.Generator) -> Tensor:
    """``[count]`` indices into ``COLORS``, among those of clips."""
    some = clip_colors(settings)
    return some[torch.randint(len(some), (count,), generator=generator)]


def clip_colors(settings: ClipSettings) -> Tensor:
    """Indices into ``COLORS`` of the colours of clips."""
    return torch.arange(settings.colors) * len(COLORS) // settings.colors


def render_clips(
    scans: Tensor, colors: Tensor, directions: Tensor, settings: ClipSettings, size: int
) -> Tensor:
    """Render ``scans [n, 1, 8, 8]`` as clips ``[n, T, 3, size, size]`` in [-1, 1].

    Every digit starts in the middle, so that its first frame does not tell where it goes, and moves
    at a constant speed.

    Args:
        colors: ``[n]`` indices into ``COLORS``.
        directions: ``[n]`` indices into ``DIRECTIONS``.
        settings: of the clips.
        size: side of a frame.
    """
    many = settings.frames
    way = torch.tensor(tuple(STEPS.values()))[directions]
    time = torch.arange(many) / many
    moved = 2 * settings.travel * time[:, None] * way[:, None]  # the frame's sides are 2 long
    matrix = torch.eye(2).expand(len(scans), many, 2, 2)
    maps = torch.cat((matrix, -moved[..., None]), 3).flatten(0, 1) / settings.side
    frames = render(scans.repeat_interleave(many, 0), colors.repeat_interleave(many), maps, size)
    return frames.unflatten(0, (-1, many))
