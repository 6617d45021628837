"""Independent classifiers of an image or a clip: which digit, which colour, which direction.

None is fitted on images that the model generates: the digit classifier is fitted on real scans
alone, the colour classifier measures distances to the palette, and the direction is that of the
ink's centroid.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from emu3.demo.config import SIDE, DigitSettings
from emu3.demo.digits import (
    BACKGROUND,
    COLORS,
    PALETTE,
    Digits,
    at_rest,
    render,
    sample_motion,
)
from emu3.demo.moving import DIRECTIONS, STEPS

# Ink is pooled to 12x12: finer than the 8x8 scans, coarse enough to ignore the rendering.
_FEATURES = 12
_MOVED_COPIES = 3
NO_DIRECTION = len(DIRECTIONS)
"""What ``judge_direction`` returns of a digit that hardly moves, or moves diagonally."""
_STILL = 1 / 24
"""Share of the frame that a moving digit moves at least."""


class DigitJudge:
    """A support-vector classifier fitted on real digits in random colours.

    Args:
        settings: of the motion of the real digits.
        side: of the digits to judge, as a share of the image's. Small ones are looked at where
            their ink is, as large as the real ones are.
    """

    def __init__(
        self, digits: Digits, settings: DigitSettings, size: int, side: float = SIDE
    ) -> None:
        self._zoom = None if side == SIDE else side / SIDE
        settings = settings.model_copy(update={"side": SIDE})
        generator = torch.Generator().manual_seed(0)
        count = len(digits)
        motions = [at_rest(count)]
        motions += [sample_motion(count, settings, generator) for _ in range(_MOVED_COPIES)]
        features = []
        for motion in motions:
            colors = torch.randint(len(COLORS), (count,), generator=generator)
            images = render(digits.scans, colors, motion, size)
            features.append(_features(images if self._zoom is None else _centred(images, 1.0)))
        labels = np.tile(digits.labels.numpy(), len(motions))
        self._classifier = SVC(C=10.0).fit(np.concatenate(features), labels)

    def __call__(self, images: Tensor) -> Tensor:
        """Digits ``[B]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        seen = images if self._zoom is None else _centred(images, self._zoom)
        return torch.from_numpy(self._classifier.predict(_features(seen)))

    def of_clips(self, clips: Tensor) -> Tensor:
        """Digits ``[B]`` of clips ``[B, T, 3, H, W]``: of most of their frames."""
        return self(clips.flatten(0, 1)).view(clips.shape[:2]).mode(1).values


def judge_color(images: Tensor) -> Tensor:
    """Index ``[B]`` into ``COLORS`` of the colour nearest in direction to the bright pixels.

    A thin stroke is dimmer than its paint, so the direction from the background is compared.
    """
    return color_similarity(images).argmax(1)


def color_similarity(images: Tensor) -> Tensor:
    """Cosines ``[B, colours]`` of the bright pixels' mean and each paint, from the background."""
    paint = torch.tensor(tuple(PALETTE.values()), dtype=torch.float32)
    ground = torch.tensor(BACKGROUND, dtype=torch.float32)
    strength = ink(images)
    bright = (strength >= 0.6 * strength.amax((2, 3), keepdim=True)).to(images.dtype)
    mean = (images * bright).sum((2, 3)) / bright.sum((2, 3))
    direction = F.normalize((mean + 1) * 127.5 - ground, dim=1)
    return direction @ F.normalize(paint - ground, dim=1).T


def judge_direction(clips: Tensor) -> Tensor:
    """Index ``[B]`` into ``DIRECTIONS``, or ``NO_DIRECTION``, of clips ``[B, T, 3, H, W]``.

    The ink's centroid must move by a share of the frame along one axis, and by less than half of
    that along the other.
    """
    path = _centroids(clips.flatten(0, 1)).view(*clips.shape[:2], 2)
    change = (path[:, -1] - path[:, 0]) / 2  # the frame's sides are 2 long
    across, along = change.abs().sort(1).values.unbind(1)
    ways = torch.tensor(tuple(STEPS.values()))
    moves = (along >= _STILL) & (across < along / 2)
    return torch.where(moves, (change @ ways.T).argmax(1), NO_DIRECTION)


def _centred(images: Tensor, zoom: float) -> Tensor:
    """Windows of ``zoom`` of ``images``, as large as they, around the ink's centroid."""
    scale = torch.eye(2).mul(zoom).expand(len(images), 2, 2)
    maps = torch.cat((scale, _centroids(images)[:, :, None]), 2)
    where = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, where, padding_mode="border", align_corners=False)


def _centroids(images: Tensor) -> Tensor:
    """``[B, 2]`` x and y in [-1, 1] of the ink, without the faint noise of a background."""
    strength = ink(images)[:, 0]
    strength = strength * (strength >= 0.3 * strength.amax((1, 2), keepdim=True))
    mass = strength.sum((1, 2)).clamp_min(1e-6)
    height, width = strength.shape[1:]
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    return torch.stack(((strength.sum(1) @ x) / mass, (strength.sum(2) @ y) / mass), 1)


def ink(images: Tensor) -> Tensor:
    """How far ``[B, 1, H, W]`` pixels are from the background, in their brightest channel."""
    ground = torch.tensor(BACKGROUND, device=images.device).view(3, 1, 1) / 127.5 - 1
    return (images - ground).amax(1, keepdim=True).clamp_min(0)


def _features(images: Tensor) -> np.ndarray:
    pooled = F.adaptive_avg_pool2d(ink(images), _FEATURES).flatten(1)
    return (pooled / pooled.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
