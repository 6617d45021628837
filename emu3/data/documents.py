"""Documents to batches: padded ids and the loss weight of every token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emu3.config import Vocabulary


def collate(
    documents: Sequence[Sequence[int]], vocabulary: Vocabulary, vision_weight: float
) -> tuple[Tensor, Tensor]:
    """Pad documents on the right.

    Args:
        vision_weight: loss weight of visual tokens; text and grammar weigh 1, padding 0.

    Returns:
        ids ``[B, T]`` int64 and weights ``[B, T]`` float32.
    """
    longest = max(map(len, documents))
    tokens = torch.tensor([[*ids, *[vocabulary.pad] * (longest - len(ids))] for ids in documents])
    lengths = torch.tensor([len(ids) for ids in documents])
    weights = torch.where(tokens >= vocabulary.visual_start, vision_weight, 1.0)
    padding = torch.arange(longest) >= lengths[:, None]
    return tokens, weights.masked_fill(padding, 0.0)
