"""Sizes of temporal_residual that the tests check and the benchmarks time."""

from math import prod

import torch
from torch import Tensor

CHECK = [
    {"shape": [0, 4, 3, 5, 8]},
    {"shape": [1, 4, 0, 5, 8]},
    {"shape": [1, 1, 1, 1, 1]},
    {"shape": [1, 3, 3, 1, 9]},
    {"shape": [1, 16, 3, 6, 33]},
    {"shape": [1, 5, 2, 7, 20]},  # channels that fill no register block
    {"shape": [1, 8, 3, 35, 37]},  # rows beyond one tile of a thread, ragged
    {"shape": [2, 4, 5, 7, 39]},
]
TIME = [
    {"shape": [1, 4, 32, 64, 64]},  # Emu3: 32 latent frames of 512 x 512
    {"shape": [1, 8, 32, 64, 64]},
    {"shape": [1, 16, 32, 64, 64]},
    {"shape": [1, 4, 1, 90, 90]},  # one image of 720 x 720
]


def make(*, shape: list[int], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw hidden values and results of about one, and norms as training leaves them."""
    random = torch.Generator(device).manual_seed(0)
    channels = shape[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    inputs = {"x": 1.5 * draw(*shape)}
    for i in "12":
        weight = draw(channels, channels, 3, 3, 3) / (27 * channels) ** 0.5
        inputs |= {f"scale{i}": 1 + 0.3 * draw(channels), f"shift{i}": draw(channels)}
        inputs |= {f"weight{i}": weight, f"bias{i}": draw(channels)}
    return {name: value.to(dtype) for name, value in inputs.items()}


def flops(*, shape: list[int], dtype: torch.dtype) -> int:
    """Products and sums of the two convolutions, those with the zeros around them included."""
    return 2 * 2 * 27 * shape[1] * prod(shape)
