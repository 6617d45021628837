"""Sizes of rms_norm that the tests check and the benchmarks time."""

import torch
from torch import Tensor

CHECK = [
    {"num_rows": 0, "width": 8},
    {"num_rows": 1, "width": 3},
    {"num_rows": 3, "width": 41},
    {"num_rows": 37, "width": 256},  # three blocks of rows for the gradient of the weight
    {"num_rows": 2, "width": 1030},  # one power of two and a ragged rest
    {"num_rows": 5, "width": 16425},  # longer than a row that any kernel keeps at hand
]
TIME = [
    {"num_rows": 4096, "width": 4096},  # Emu3-8B, one packed sequence
]
DECODE = [{"num_rows": 1, "width": 4096}]  # Emu3-8B, one decoded token


def make(*, num_rows: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    x = 3 * torch.randn(num_rows, width, generator=random, device=device)
    weight = 1 + torch.randn(width, generator=random, device=device)
    return {"x": x.to(dtype), "weight": weight.to(dtype)}


def bytes_moved(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """Forward traffic that no implementation can avoid: a read and a write."""
    return 2 * num_rows * width * dtype.itemsize


def backward_bytes(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """Of a backward pass: dout and x are read, dx is written; the weight is small."""
    return 3 * num_rows * width * dtype.itemsize
