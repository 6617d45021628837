"""Sizes of rms_norm and add_rms_norm that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases

CHECK_RMS_NORM = [
    {"num_rows": 0, "width": 8},
    {"num_rows": 1, "width": 3},
    {"num_rows": 3, "width": 41},
    {"num_rows": 37, "width": 256},  # three blocks of rows for the gradient of the weight
    {"num_rows": 2, "width": 1030},  # one power of two and a ragged rest
    {"num_rows": 5, "width": 16425},  # wider than a row that any kernel holds in registers
]
CHECK_ADD_RMS_NORM = [
    *CHECK_RMS_NORM[:-1],
    {"num_rows": 0, "width": 8, "dropout_p": 0.1},
    {"num_rows": 37, "width": 41, "dropout_p": 0.1},
    {"num_rows": 5, "width": 16425, "dropout_p": 0.5},
    CHECK_RMS_NORM[-1],
]
TIME = [{"num_rows": 4096, "width": 4096}]  # Emu3-8B, one packed sequence
DECODE = [{"num_rows": 1, "width": 4096}]  # Emu3-8B, one decoded token


def make_rms_norm(
    *, num_rows: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    x = 3 * torch.randn(num_rows, width, generator=random, device=device)
    weight = 1 + torch.randn(width, generator=random, device=device)
    return {"x": x.to(dtype), "weight": weight.to(dtype)}


def make_add_rms_norm(
    *, num_rows: int, width: int, dtype: torch.dtype, device: str, dropout_p: float = 0.0
) -> dict[str, Tensor | float]:
    random = torch.Generator(device).manual_seed(0)
    x, residual = (torch.randn(num_rows, width, generator=random, device=device) for _ in range(2))
    weight = 1 + torch.randn(width, generator=random, device=device)
    inputs = {"x": x.to(dtype), "residual": (3 * residual).to(dtype), "weight": weight.to(dtype)}
    if not dropout_p:
        return inputs
    return inputs | {"dropout_p": dropout_p, "seed": torch.tensor(-5 << 40, device=device)}


def _matrices(count: int, *, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` tensors ``[num_rows, width]``; the weight is small."""
    return count * num_rows * width * dtype.itemsize


CASES = {
    "rms_norm": Cases(
        make=make_rms_norm,
        check=CHECK_RMS_NORM,
        time=TIME,
        decode=DECODE,
        # x is read, y is written; dy and x are read, dx is written.
        bytes_moved=lambda **size: _matrices(2, **size),
        backward_bytes=lambda **size: _matrices(3, **size),
    ),
    "add_rms_norm": Cases(
        make=make_add_rms_norm,
        check=CHECK_ADD_RMS_NORM,
        time=TIME,
        decode=DECODE,
        # x and residual are read, y and summed are written; dy, dsummed and summed are read, one
        # gradient serves both x and residual.
        bytes_moved=lambda **size: _matrices(4, **size),
        backward_bytes=lambda **size: _matrices(4, **size),
    ),
}
