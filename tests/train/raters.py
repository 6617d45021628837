"""Voters of the tests."""

from collections.abc import Sequence

from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Of a far larger scale."""
    return 1000 * (images[:, 0] - images[:, 2]).mean((1, 2))


def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3)) / 0
