"""Scores of the images in a token store, which a recipe selects the better ones by."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from emu3.data.codes import fingerprint
from emu3.data.store import Kind, Store
from emu3.prompt import parse_document
from emu3.text import TextTokenizer
from emu3.vision import VisionTokenizer

Score = Callable[[Tensor, Sequence[str]], Tensor]
"""``score(images [B, 3, H, W] in [0, 1], prompts) -> [B]``, higher is better."""


def score_store(
    store: Store,
    vision: VisionTokenizer,
    text: TextTokenizer,
    voters: Sequence[Score],
    *,
    batch_size: int = 16,
) -> np.ndarray:
    """Score the image of every pair, decoded from its codes, beside its caption.

    Args:
        voters: of one, its scores are taken; of several, the mean of the shares of images that each
            of them puts below.
        batch_size: images that are decoded and scored at once.

    Returns:
        ``[documents]`` float32, NaN of those that are no pair of a caption and one image.

    Raises:
        ValueError: one line, if ``vision`` did not make the codes, or nothing can be scored.
    """
    wanted = fingerprint(vision)
    for shard in store.shards:
        if shard.header.made.vision not in (None, wanted):
            raise ValueError(f"store: {shard.prefix} has codes of another vision tokenizer")
    votes = np.full((len(voters), len(store)), np.nan, np.float32)
    for numbers, codes, captions in _batches(store, text, batch_size):
        pixels = vision.decode(codes.to(vision.codebook.device))
        images = (pixels.float() / 2 + 0.5).clamp(0, 1)
        for vote, score in zip(votes, voters, strict=True):
            vote[numbers] = torch.as_tensor(score(images, captions)).float().cpu().numpy()
    scored = np.flatnonzero(~np.isnan(votes).any(0))
    if not len(scored):
        raise ValueError(f"store: {store.folder} has no pair of a caption and an image to score")
    if len(voters) == 1:
        return votes[0]
    means = np.full(len(store), np.nan, np.float32)
    means[scored] = np.mean([_shares_below(vote[scored]) for vote in votes], 0)
    return means


def _batches(
    store: Store, text: TextTokenizer, size: int
) -> Iterator[tuple[list[int], Tensor, list[str]]]:
    """Numbers, codes ``[B, h, w]`` and captions of images of one size."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, str]]] = {}
    for number in range(len(store)):
        shard, at = store.find(number)
        if shard.kinds[at] != Kind.PAIR:
            continue
        *words, codes = parse_document(shard.ids(at).tolist(), text)
        if not isinstance(codes, Tensor):
            continue
        same = waiting.setdefault(tuple(codes.shape), [])
        same.append((number, codes, "".join(words)))
        if len(same) == size:
            yield _batch(waiting.pop(tuple(codes.shape)))
    yield from map(_batch, waiting.values())


def _batch(found: list[tuple[int, Tensor, str]]) -> tuple[list[int], Tensor, list[str]]:
    numbers, codes, captions = zip(*found, strict=True)
    return list(numbers), torch.stack(codes), list(captions)


def _shares_below(scores: np.ndarray) -> np.ndarray:
    """Of each score, the share of all that are lower; equal ones have equal shares."""
    return np.searchsorted(np.sort(scores), scores) / len(scores)
