"""Independent judges of a picture: which digit, and which colour.

Neither sees anything that the model made before it is asked: the digit judge is fitted on
real scans alone, and the colour judge measures distances to the palette.
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
    draw_motion,
    render,
)

# Ink is read at 12x12: finer than the 8x8 scans, coarse enough to forget the rendering.
_FEATURES = 12
_MOVED_COPIES = 3


class DigitJudge:
    """A support-vector classifier fitted on real digits in random colours."""

    def __init__(self, digits: Digits, settings: DigitSettings, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = len(digits)
        motions = [at_rest(count)]
        motions += [draw_motion(count, settings, generator) for _ in range(_MOVED_COPIES)]
        features = []
        for motion in motions:
            colors = torch.randint(len(COLORS), (count,), generator=generator)
            features.append(_features(render(digits.scans, colors, motion, size)))
        labels = np.tile(digits.labels.numpy(), len(motions))
        self._classifier = SVC(C=10.0).fit(np.concatenate(features), labels)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Digits ``[B]`` of pictures ``[B, 3, H, W]`` in [-1, 1]."""
        return torch.from_numpy(self._classifier.predict(_features(pictures)))


def judge_color(pictures: Tensor) -> Tensor:
    """Index into ``COLORS`` of the palette colour that the bright pixels lean to, ``[B]``.

    A thin stroke is dimmer than its paint, so the direction from the background is compared.
    """
    paint = torch.tensor(tuple(PALETTE.values()), dtype=torch.float32)
    ground = torch.tensor(BACKGROUND, dtype=torch.float32)
    ink = _ink(pictures)
    bright = (ink >= 0.6 * ink.amax((2, 3), keepdim=True)).to(pictures.dtype)
    mean = (pictures * bright).sum((2, 3)) / bright.sum((2, 3))
    seen = F.normalize((mean + 1) * 127.5 - ground, dim=1)
    return (seen @ F.normalize(paint - ground, dim=1).T).argmax(1)


def _ink(pictures: Tensor) -> Tensor:
    ground = torch.tensor(BACKGROUND, device=pictures.device).view(3, 1, 1) / 127.5 - 1
    return (pictures - ground).amax(1, keepdim=True).clamp_min(0)


def _features(pictures: Tensor) -> np.ndarray:
    pooled = F.adaptive_avg_pool2d(_ink(pictures), _FEATURES).flatten(1)
    return (pooled / pooled.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
