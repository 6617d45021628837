"""Fréchet distance between two sets of images, by their embeddings."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emu3.weights.clip import Clip


@dataclass
class Moments:
    """Mean and covariance of the embeddings of images, in float64."""

    clip: Clip
    count: int = 0
    _sum: Tensor = field(init=False)
    _products: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = self.clip.width
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Add ``[B, 3, H, W]`` uint8."""
        self.add_embeddings(self.clip.images(images.float() / 255))

    def add_embeddings(self, embeddings: Tensor) -> None:
        """Add ``[B, D]``."""
        x = embeddings.cpu().double()
        self.count += len(x)
        self._sum += x.sum(0)
        self._products += x.T @ x

    @property
    def mean(self) -> Tensor:
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        return (self._products - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """``|m - n|² + tr(C + D - 2 (C D)^½)`` of two sets of two images at least.

    With embeddings of CLIP it is comparable with none of Inception. Few images make it too large:
    compare equal counts, of more images than the embedding is wide.
    """
    c, d = one.covariance, other.covariance
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # The eigenvalues of C D are those of this symmetric matrix.
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + c.trace() + d.trace() - 2 * cross
    return max(0.0, distance.item())
