"""Sizes of conv3x3 that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases


def make(
    *, shape: list[int], out: int, residual: bool = False, dtype: torch.dtype, device: str
) -> dict[str, Tensor | None]:
    """Draw channels-last inputs whose results are about one."""
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
    """One read of every input and one write of the output; FLOPs depend on the algorithm."""
    batch, channels, height, width = shape
    pixels = batch * height * width * (channels + (1 + residual) * out)
    return (pixels + 9 * channels * out) * dtype.itemsize


CASES = {
    "conv3x3": Cases(
        make=make,
        check=[
            {"shape": [0, 16, 48, 48], "out": 64},
            {"shape": [1, 16, 1, 512], "out": 64},  # one row: most of every tile is padding
            {"shape": [2, 48, 45, 47], "out": 64, "residual": True},  # ragged; blocks of two images
            {"shape": [1, 144, 44, 61], "out": 128},  # two blocks of input and output channels
        ],
        time=[
            {"shape": [1, 256, 256, 256], "out": 256, "residual": True},  # Emu3's decoder, 256x256
            {"shape": [1, 512, 128, 128], "out": 512, "residual": True},
            {"shape": [1, 512, 64, 64], "out": 512, "residual": True},
        ],
        bytes_moved=bytes_moved,
        cpu_dtypes=(torch.bfloat16,),
    )
}
