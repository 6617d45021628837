"""Documents to batches: padded ids and the loss weight of every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu3.config import Vocabulary


@dataclass(frozen=True)
class Lesson:
    """A document, and the first of its tokens that is learned."""

    ids: list[int]
    start: int = 1


def collate(
    lessons: Sequence[Lesson], vocabulary: Vocabulary, vision_weight: float
) -> tuple[Tensor, Tensor]:
    """Pad documents on the right.

    Args:
        vision_weight: loss weight of visual tokens; text and grammar weigh 1, padding and
            what stands before a lesson's start 0.

    Returns:
        ids ``[B, T]`` int64 and weights ``[B, T]`` float32.
    """
    longest = max(len(lesson.ids) for lesson in lessons)
    padding = [[vocabulary.pad] * (longest - len(lesson.ids)) for lesson in lessons]
    tokens = torch.tensor(
        [[*lesson.ids, *pad] for lesson, pad in zip(lessons, padding, strict=True)]
    )
    starts = torch.tensor([lesson.start for lesson in lessons])
    stops = torch.tensor([len(lesson.ids) for lesson in lessons])
    place = torch.arange(longest)
    learned = (place >= starts[:, None]) & (place < stops[:, None])
    weights = torch.where(tokens >= vocabulary.visual_start, vision_weight, 1.0)
    return tokens, weights.masked_fill(~learned, 0.0)
