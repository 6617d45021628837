"""Voters for digits: the judges of the demo, and two scorers that they never see.

Name them to ``emu3 evaluate`` as ``emu3.demo.voters:digit`` and ``emu3.demo.voters:color``; their
means are accuracies. ``likeness`` and ``strokes`` choose what is trained on, so that the judges
stay independent: they are of another family of models, on other features. All are fitted on real
scans alone.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import COLORS, load_split, read_caption, render, sample_motion
from emu3.demo.judge import DigitJudge, color_similarity, ink, judge_color

_SHARPNESS = 30.0
"""Of the softmax over the cosines of colours."""
_LEAST = 1e-6
"""A probability below is as unlikely as this one."""


class _Network(NamedTuple):
    """A small network on pooled ink, finer than that of the judge."""

    features: int
    """Side of the pooled ink."""
    hidden: int
    alpha: float
    copies: int
    """Of each scan, moved."""
    seed: int
    """Of the motion."""
    state: int
    """Of the network's first weights."""


_LIKENESS = _Network(features=16, hidden=64, alpha=1e-3, copies=4, seed=7, state=0)
_STROKES = _Network(features=14, hidden=48, alpha=1e-2, copies=3, seed=11, state=1)


def digit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where an image ``[B, 3, H, H]`` in [0, 1] shows the digit that its prompt names, else 0."""
    judged = _judge(images.shape[-1])(images.cpu() * 2 - 1)
    return (judged == _wanted(prompts)[0]).float()


def color(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where an image ``[B, 3, H, H]`` in [0, 1] has the colour that its prompt names, else 0."""
    return (judge_color(images.cpu() * 2 - 1) == _wanted(prompts)[1]).float()


def likeness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of ``log p(digit)`` and ``log p(colour)`` of images ``[B, 3, H, H]`` in [0, 1]."""
    pixels = images.cpu() * 2 - 1
    digits, colors = _wanted(prompts)
    of_colors = (_SHARPNESS * color_similarity(pixels)).log_softmax(1)
    of_colors = of_colors.gather(1, colors[:, None])[:, 0].clamp_min(np.log(_LEAST))
    return (_log_likelihood(_LIKENESS, pixels, digits) + of_colors) / 2


def strokes(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``log p(digit)`` of images ``[B, 3, H, H]`` in [0, 1], by another network."""
    return _log_likelihood(_STROKES, images.cpu() * 2 - 1, _wanted(prompts)[0])


def _log_likelihood(network: _Network, pixels: Tensor, digits: Tensor) -> Tensor:
    features = _pooled(pixels, network.features)
    probabilities = _classifier(network, pixels.shape[-1]).predict_proba(features)
    of_digits = torch.from_numpy(probabilities).float().gather(1, digits[:, None])[:, 0]
    return of_digits.clamp_min(_LEAST).log()


def _wanted(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The digit and the colour that each prompt names."""
    found = [read_caption(prompt) for prompt in prompts]
    for prompt, one in zip(prompts, found, strict=True):
        if None in one:
            raise ValueError(f'voter: a prompt must read "a red seven" for digits, got {prompt!r}')
    digits, colors = zip(*found, strict=True)
    return torch.tensor(digits), torch.tensor(colors)


@cache
def _judge(size: int) -> DigitJudge:
    settings = DigitSettings()
    return DigitJudge(load_split(settings.validation)[0], settings, size)


@cache
def _classifier(network: _Network, size: int) -> MLPClassifier:
    settings, generator = DigitSettings(), torch.Generator().manual_seed(network.seed)
    digits = load_split(settings.validation)[0]
    features = []
    for _ in range(network.copies):
        colors = torch.randint(len(COLORS), (len(digits),), generator=generator)
        motion = sample_motion(len(digits), settings, generator)
        moved = render(digits.scans, colors, motion, size)
        features.append(_pooled(moved, network.features))
    how = {"alpha": network.alpha, "max_iter": 40, "early_stopping": True}
    classifier = MLPClassifier((network.hidden,), random_state=network.state, **how)
    labels = np.tile(digits.labels.numpy(), network.copies)
    return classifier.fit(np.concatenate(features), labels)


def _pooled(images: Tensor, side: int) -> np.ndarray:
    pooled = F.adaptive_avg_pool2d(ink(images), side).flatten(1)
    return (pooled / pooled.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
