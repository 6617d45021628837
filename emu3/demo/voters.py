"""Voters for digits: the judges of the demo, and a scorer that they never see.

Name them to ``emu3 evaluate`` as ``emu3.demo.voters:digit`` and ``emu3.demo.voters:color``; their
means are accuracies. ``likeness`` selects what is trained on, so that the judges stay independent:
it is of another family of models, on other features. All are fitted on real scans alone.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import COLORS, load_split, read_caption, render, sample_motion
from emu3.demo.judge import DigitJudge, color_similarity, ink, judge_color

_FEATURES = 16
"""Side of the pooled ink of ``likeness``, finer than that of the judge."""
_MOVED_COPIES = 4
_SHARPNESS = 30.0
"""Of the softmax over the cosines of colours."""
_LEAST = 1e-6
"""A probability below is as unlikely as this one."""


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
    classifier = _classifier(images.shape[-1])
    probabilities = torch.from_numpy(classifier.predict_proba(_pooled(pixels))).float()
    of_digits = probabilities.gather(1, digits[:, None])[:, 0].clamp_min(_LEAST).log()
    of_colors = (_SHARPNESS * color_similarity(pixels)).log_softmax(1)
    return (of_digits + of_colors.gather(1, colors[:, None])[:, 0].clamp_min(np.log(_LEAST))) / 2


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
def _classifier(size: int) -> MLPClassifier:
    settings, generator = DigitSettings(), torch.Generator().manual_seed(7)
    digits = load_split(settings.validation)[0]
    features = []
    for _ in range(_MOVED_COPIES):
        colors = torch.randint(len(COLORS), (len(digits),), generator=generator)
        motion = sample_motion(len(digits), settings, generator)
        features.append(_pooled(render(digits.scans, colors, motion, size)))
    classifier = MLPClassifier((64,), alpha=1e-3, max_iter=40, random_state=0, early_stopping=True)
    labels = np.tile(digits.labels.numpy(), _MOVED_COPIES)
    return classifier.fit(np.concatenate(features), labels)


def _pooled(images: Tensor) -> np.ndarray:
    pooled = F.adaptive_avg_pool2d(ink(images), _FEATURES).flatten(1)
    return (pooled / pooled.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
