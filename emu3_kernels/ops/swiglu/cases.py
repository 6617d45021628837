"""Sizes of swiglu that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases


def make(*, num_rows: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    gate, up = (torch.randn(num_rows, width, generator=random, device=device) for _ in range(2))
    return {"gate": (4 * gate).to(dtype), "up": up.to(dtype)}  # 4x reaches the flat tails of SiLU


def bytes_moved(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """gate and up are read, out is written."""
    return 3 * num_rows * width * dtype.itemsize


def backward_bytes(*, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """dout, gate and up are read, dgate and dup are written."""
    return 5 * num_rows * width * dtype.itemsize


CASES = {
    "swiglu": Cases(
        make=make,
        check=[
            {"num_rows": 0, "width": 8},
            {"num_rows": 3, "width": 41},
            {"num_rows": 2, "width": 1030},  # one full block of the Triton kernel, one ragged
        ],
        time=[{"num_rows": 2048, "width": 14336}],  # Emu3-8B, one packed sequence
        decode=[{"num_rows": 1, "width": 14336}],  # Emu3-8B, one decoded token
        bytes_moved=bytes_moved,
        backward_bytes=backward_bytes,
    )
}
