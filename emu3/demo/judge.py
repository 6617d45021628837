"""Independent classifiers of an image: which digit, and which colour.

Neither is fitted on images that the model generates: the digit classifier is fitted on real scans
alone, and the colour classifier measures distances to the palette.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import (
    BACKGROUND,
    COLORS,
    PALETTE,
    Digits,
    at_rest,
    render,
    sample_motion,
)

# Ink is pooled to 12x12: finer than the 8x8 scans, coarse enough to ignore the rendering.
_FEATURES = 12
_MOVED_COPIES = 3


class DigitJudge:
    """A support-vector classifier fitted on real digits in random colours."""

    def __init__(self, digits: Digits, settings: DigitSettings, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = len(digits)
        motions = [at_rest(count)]
        motions += [sample_motion(count, settings, generator) for _ in range(_MOVED_COPIES)]
        features = []
        for motion in motions:
            colors = torch.randint(len(COLORS), (count,), generator=generator)
            features.append(_features(render(digits.scans, colors, motion, size)))
        labels = np.tile(digits.labels.numpy(), len(motions))
        self._classifier = SVC(C=10.0).fit(np.concatenate(features), labels)

    def __call__(self, images: Tensor) -> Tensor:
        """Digits ``[B]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        return torch.from_numpy(self._classifier.predict(_features(images)))


def judge_color(images: Tensor) -> Tensor:
    """Index ``[B]`` into ``COLORS`` of the colour nearest in direction to the bright pixels.

    A thin stroke is dimmer than its paint, so the direction from the background is compared.
    """
    paint = torch.tensor(tuple(PALETTE.values()), dtype=torch.float32)
    ground = torch.tensor(BACKGROUND, dtype=torch.float32)
    ink = _ink(images)
    bright = (ink >= 0.6 * ink.amax((2, 3), keepdim=True)).to(images.dtype)
    mean = (images * bright).sum((2, 3)) / bright.sum((2, 3))
    direction = F.normalize((mean + 1) * 127.5 - ground, dim=1)
    return (direction @ F.normalize(paint - ground, dim=1).T).argmax(1)


def _ink(images: Tensor) -> Tensor:
    ground = torch.tensor(BACKGROUND, device=images.device).view(3, 1, 1) / 127.5 - 1
    return (images - ground).amax(1, keepdim=True).clamp_min(0)


def _features(images: Tensor) -> np.ndarray:
    pooled = F.adaptive_avg_pool2d(_ink(images), _FEATURES).flatten(1)
    return (pooled / pooled.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
