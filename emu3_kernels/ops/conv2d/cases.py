"""Sizes of conv3x3 that the tests check and the benchmarks time."""

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.bfloat16,)
CHECK = [
    {"shape": [0, 16, 48, 48], "out": 64},
    {"shape": [1, 16, 1, 512], "out": 64},  # one row: most of every tile is outside
    {"shape": [2, 48, 45, 47], "out": 64, "residual": True},  # ragged tiles; blocks over pictures
    {"shape": [1, 144, 44, 61], "out": 128},  # more channels than one stretch, two panels
]
TIME = [
    {"shape": [1, 256, 256, 256], "out": 256, "residual": True},  # Emu3's decoder at 256 x 256
    {"shape": [1, 512, 128, 128], "out": 512, "residual": True},
    {"shape": [1, 512, 64, 64], "out": 512, "residual": True},
]


def make(
    *, shape: list[int], out: int, residual: bool = False, dtype: torch.dtype, device: str
) -> dict[str, Tensor | None]:
    """Draw results of about one, in channels-last memory."""
    random = torch.Generator(device).manual_seed(0)
    batch, channels, height, width = shape

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=random, device=device).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if len(size) == 4 else drawn

    weight = draw(out, channels, 3, 3) / (9 * channels) ** 0.5
    return {
        "x": draw(*shape),
        "weight": weight,
        "bias": draw(out),
        "residual": draw(batch, out, height, width) if residual else None,
    }


def bytes_moved(*, shape: list[int], out: int, residual: bool = False, dtype: torch.dtype) -> int:
    """Count what must be read and written; how many products it takes is up to the algorithm."""
    batch, channels, height, width = shape
    pixels = batch * height * width * (channels + (1 + residual) * out)
    return (pixels + 9 * channels * out) * dtype.itemsize
