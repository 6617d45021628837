"""Sizes of add_rms_norm that the tests check and the benchmarks time."""

import torch
from torch import Tensor

CHECK = [
    {"num_rows": 0, "width": 8},
    {"num_rows": 1, "width": 3},
    {"num_rows": 3, "width": 41},
    {"num_rows": 37, "width": 256},  # three blocks of rows for the gradient of the weight
    {"num_rows": 2, "width": 1030},  # one power of two and a ragged rest
    {"num_rows": 0, "width": 8, "dropout_p": 0.1},
    {"num_rows": 37, "width": 41, "dropout_p": 0.1},
    {"num_rows": 5, "width": 16425, "dropout_p": 0.5},
    {"num_rows": 5, "width": 16425},  # longer than a row that any kernel keeps at hand
]
TIME = [
    {"num_rows": 4096, "width": 4096},  # Emu3-8B, one packed sequence
]
DECODE = [{"num_rows": 1, "width": 4096}]  # Emu3-8B, one decoded token


def make(
    *, num_rows: int, width: int, dtype: torch.dtype, device: str, dropout_p: float = 0.0
) -> dict[str, Tensor | float]:
    random = torch.Generator(device).manual_seed(0)
    x, residual = (torch.randn(num_rows, width, generator=random, device=device) for _ in range(2))
    weight = 1 + torch.randn(width, generator=random, device=device)
    inputs = {"x": x.to(dtype), "residual": (3 * residual).to(dtype), "weight": weight.to(dtype)}
    if not dropout_p:
        return inputs
    return inputs | {"dropout_p": dropout_p, "seed": torch.tensor(-5 << 40, device=device)}


def bytes_moved(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """Forward traffic that no implementation can avoid: two reads and two writes."""
    return 4 * num_rows * width * dtype.itemsize


def backward_bytes(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """Of a backward pass: two gradients and the sum are read, one gradient serves both."""
    return 4 * num_rows * width * dtype.itemsize
