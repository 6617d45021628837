"""Handwritten digits in colour: the real scans inside scikit-learn, enlarged.

Validation digits are split off before anything else reads the data. Colour and a small motion
are sampled every time a digit is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.demo.config import SIDE, DigitSettings

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PALETTE = {
    "red": (235, 64, 52),
    "orange": (255, 150, 30),
    "yellow": (250, 230, 70),
    "green": (60, 200, 90),
    "cyan": (60, 215, 235),
    "blue": (65, 110, 255),
    "purple": (165, 75, 230),
    "white": (245, 245, 245),
}
BACKGROUND = (16, 18, 28)
COLORS = tuple(PALETTE)


@dataclass(frozen=True)
class Digits:
    """Scans ``[n, 1, 8, 8]`` in [0, 1] and their digits ``[n]``."""

    scans: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Digits":
        return Digits(self.scans[index], self.labels[index])


def load_split(validation: float, seed: int = 0) -> tuple[Digits, Digits]:
    """Split the digits, each class in the same proportion: training digits and validation digits.

    The split depends on ``validation`` and ``seed`` alone.

    Raises:
        ValueError: no digit is left to train on.
    """
    # Imported here: the rendering and the captions below need no scikit-learn.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    digits = Digits(scans, torch.tensor(bunch.target))
    generator = torch.Generator().manual_seed(seed)
    train_set, validation_set = [], []
    for digit in range(len(DIGITS)):
        members = (digits.labels == digit).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(len(members) * validation)
        validation_set.append(members[:cut])
        train_set.append(members[cut:])
    if not any(len(members) for members in train_set):
        raise ValueError(
            f"data.validation: at least one digit must be left to train on, got {validation}"
        )
    return digits[torch.cat(train_set)], digits[torch.cat(validation_set)]


def caption(digit: int, color: int) -> str:
    """The caption of an image: "a red seven", "an orange one"."""
    name = COLORS[color]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {DIGITS[digit]}"


def read_caption(text: str) -> tuple[int | None, int | None]:
    """The digit and the colour that a caption names, None where it names no known one."""
    words = text.split()
    digit = words[-1] if words else ""
    color = words[-2] if len(words) > 1 else ""
    return (
        DIGITS.index(digit) if digit in DIGITS else None,
        COLORS.index(color) if color in COLORS else None,
    )


def sample_motion(count: int, settings: DigitSettings, generator: torch.Generator) -> Tensor:
    """``[count, 2, 3]`` affine maps: a rotation, a change of size and a shift, all small."""
    rotate, scale, x, y = 2 * torch.rand(4, count, generator=generator) - 1
    angle = rotate * math.radians(settings.rotate)
    size = (1 + scale * settings.scale) / settings.side
    cos, sin = angle.cos() * size, angle.sin() * size
    x, y = 2 * settings.shift * x, 2 * settings.shift * y
    return torch.stack((torch.stack((cos, -sin, x), 1), torch.stack((sin, cos, y), 1)), 1)


def at_rest(count: int, side: float = SIDE) -> Tensor:
    """``[count, 2, 3]`` affine maps to digits of ``side`` of the image in its middle."""
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).div(side).expand(count, 2, 3)


def render(scans: Tensor, colors: Tensor | Sequence[int], motion: Tensor, size: int) -> Tensor:
    """Render ``scans [n, 1, 8, 8]`` as images ``[n, 3, size, size]`` in [-1, 1].

    Args:
        colors: ``[n]`` indices into ``COLORS``.
        motion: ``[n, 2, 3]`` affine maps from the image to the scan.
        size: side of the image.
    """
    where = F.affine_grid(motion, (len(scans), 1, size, size), align_corners=False)
    ink = F.grid_sample(scans, where, mode="bicubic", align_corners=False).clamp(0, 1)
    paint = torch.tensor(tuple(PALETTE.values())) / 127.5 - 1
    ground = torch.tensor(BACKGROUND).view(3, 1, 1) / 127.5 - 1
    return ground + ink * (paint[torch.as_tensor(colors)][:, :, None, None] - ground)
