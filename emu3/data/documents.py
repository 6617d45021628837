"""Documents to batches: padded ids and the loss weight of every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu3.config import Vocabulary


@dataclass(frozen=True)
class Example:
    """A document, and the first of its tokens that has a loss."""

    ids: list[int]
    start: int = 1
    skipped: Sequence[range] = ()
    """Positions after ``start`` without a loss: what the user says in later turns."""


def collate(
    examples: Sequence[Example], vocabulary: Vocabulary, vision_weight: float
) -> tuple[Tensor, Tensor]:
    """Pad documents on the right.

    Args:
        vision_weight: loss weight of visual tokens; text and grammar weigh 1, padding and
            tokens before an example's start or in its skipped parts weigh 0.

    Returns:
        ids ``[B, T]`` int64 and weights ``[B, T]`` float32.
    """
    longest = max(len(example.ids) for example in examples)
    padding = [[vocabulary.pad] * (longest - len(example.ids)) for example in examples]
    tokens = torch.tensor(
        [[*example.ids, *pad] for example, pad in zip(examples, padding, strict=True)]
    )
    starts = torch.tensor([example.start for example in examples])
    stops = torch.tensor([len(example.ids) for example in examples])
    position = torch.arange(longest)
    valid = (position >= starts[:, None]) & (position < stops[:, None])
    for row, example in zip(valid, examples, strict=True):
        for part in example.skipped:
            row[part.start : part.stop] = False
    weights = torch.where(tokens >= vocabulary.visual_start, vision_weight, 1.0)
    return tokens, weights.masked_fill(~valid, 0.0)
