"""Votes to pairs: combined, compared, and those of people read from JSON lines.

``P`` prompts, ``K`` images of each, ``V`` voters.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Combine = Literal["mean", "rank"]
HUMAN = "human"
"""The voter's name of a file of votes."""
_IMAGE = re.compile(r"(?:.*/)?(\d+)-(\d+)(?:\.png)?")

HumanVotes = dict[tuple[int, int], float]
"""The mean score of an image, by the numbers of its prompt and of itself."""


class Chosen(NamedTuple):
    """Of the prompts that have a pair, their numbers, and those of both images; ``[n]`` each."""

    prompts: Tensor
    best: Tensor
    worst: Tensor


def combined(votes: Tensor, how: Combine) -> Tensor:
    """Combine ``votes [P, K, V]`` to ``[P, K]``: NaN where a vote is NaN.

    ``"mean"`` is for voters of one scale. ``"rank"`` takes the rank among the images of a prompt
    instead, from 0 to 1, equal scores their mean rank: no voter outweighs another.
    """
    if how == "mean":
        return votes.double().mean(2).float()
    below = (votes[:, :, None] > votes[:, None]).sum(2)
    equal = (votes[:, :, None] == votes[:, None]).sum(2)
    ranks = (below + (equal - 1) / 2) / max(1, votes.shape[1] - 1)
    return torch.where(votes.isnan(), torch.nan, ranks).mean(2).float()


def choose(scores: Tensor, gap: float) -> Chosen:
    """Take the best and the worst of the images of each prompt, if they are ``gap`` apart.

    Images of the score NaN are left out; of equal ones the first is taken.

    Args:
        scores: ``[P, K]``.
        gap: the least difference of a pair is above it.
    """
    nan = scores.isnan()
    best = scores.masked_fill(nan, -torch.inf).argmax(1)
    worst = scores.masked_fill(nan, torch.inf).argmin(1)
    rows = torch.arange(len(scores))
    kept = (scores[rows, best] - scores[rows, worst] > gap).nonzero().flatten()
    return Chosen(kept, best[kept], worst[kept])


def read_votes(path: Path, num_prompts: int, num_samples: int) -> HumanVotes:
    """Read lines such as ``{"image": "00003-2.png", "score": 1}``: averaged by image.

    Raises:
        ValueError: one line that names the line of the file.
    """
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            image, score = _vote(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f'prefer: line {number} of {path} must read {{"image": "00003-2.png", "score": 1}},'
                f" got {line.strip()[:80]!r}"
            ) from None
        if image[0] >= num_prompts or image[1] >= num_samples:
            raise ValueError(
                f"prefer: line {number} of {path} must be of {num_prompts} prompts with "
                f"{num_samples} images, got image {image[0]:05}-{image[1]}"
            )
        found[image].append(score)
    if not found:
        raise ValueError(f"prefer: {path} has no vote")
    return {image: sum(scores) / len(scores) for image, scores in found.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prefer: {path} must be UTF-8 text: {error}") from None


def _vote(record: Any) -> tuple[tuple[int, int], float]:
    prompt, image = _IMAGE.fullmatch(record["image"]).groups()
    score = float(record["score"])
    if score != score or abs(score) == float("inf"):
        raise ValueError(score)
    return (int(prompt), int(image)), score
