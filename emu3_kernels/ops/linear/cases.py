"""Sizes of linear that the tests check and the benchmarks time."""

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.bfloat16,)
CHECK = [
    {"tokens": 0, "inputs": 8, "outputs": 5},
    {"tokens": 3, "inputs": 0, "outputs": 7},
    {"tokens": 1, "inputs": 41, "outputs": 37, "biased": True},
    {"tokens": 15, "inputs": 300, "outputs": 70},  # few rows: four, two and one at a time
    {"tokens": 197, "inputs": 300, "outputs": 500, "biased": True},  # two blocks of each, ragged
]
TIME = [{"tokens": 1024, "inputs": 512, "outputs": 2816}]  # gate and up of a small model
DECODE = [
    {"tokens": 1, "inputs": 4096, "outputs": 6144},  # queries, keys and values of Emu3-8B
    {"tokens": 8, "inputs": 4096, "outputs": 6144},
]


def make(
    *,
    tokens: int,
    inputs: int,
    outputs: int,
    biased: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    """Draw results of about one."""
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    weight = draw(outputs, inputs) / max(inputs, 1) ** 0.5
    return {"x": draw(tokens, inputs), "weight": weight, "bias": draw(outputs) if biased else None}


def flops(*, tokens: int, inputs: int, outputs: int, biased: bool = False, **_: object) -> int:
    """Of one product, forward."""
    return 2 * tokens * inputs * outputs
