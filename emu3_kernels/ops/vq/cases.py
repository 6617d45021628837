"""Sizes of nearest_code that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases


def make(
    *,
    shape: tuple[int, ...],
    num_codes: int,
    dtype: torch.dtype,
    device: str,
    on_grid: bool = False,
) -> dict[str, Tensor]:
    """Normal z and codes; on a grid of eighths every distance is exact in any dtype, many equal."""
    random = torch.Generator(device).manual_seed(0)
    z = torch.randn(shape, generator=random, device=device)
    codebook = torch.randn(num_codes, shape[1], generator=random, device=device)
    if on_grid:
        z, codebook = ((x.clamp(-2, 2) * 8).round() / 8 for x in (z, codebook))
    return {"z": z.to(dtype), "codebook": codebook.to(dtype)}


def bytes_moved(
    *, shape: tuple[int, ...], num_codes: int, dtype: torch.dtype, on_grid: bool = False
) -> int:
    """Traffic that no implementation can avoid: z, the codes, an int64 for each query."""
    queries = torch.Size(shape).numel() // shape[1]
    return (queries + num_codes) * shape[1] * dtype.itemsize + queries * 8


def flops(
    *, shape: tuple[int, ...], num_codes: int, dtype: torch.dtype, on_grid: bool = False
) -> int:
    """Of a search that looks at every code; a tree looks at few."""
    queries = torch.Size(shape).numel() // shape[1]
    return queries * num_codes * (3 * shape[1] - 1)


CASES = {
    "nearest_code": Cases(
        make=make,
        check=[
            {"shape": (0, 4, 3), "num_codes": 5, "on_grid": True},
            {"shape": (1, 4), "num_codes": 1, "on_grid": True},
            {"shape": (2, 3, 5), "num_codes": 41, "on_grid": True},
            {"shape": (1, 32, 9), "num_codes": 17, "on_grid": True},
            {"shape": (1, 4, 37, 65), "num_codes": 2000, "on_grid": True},  # a tree pays on a CPU
            {"shape": (2, 4, 3, 5, 7), "num_codes": 1025, "on_grid": True},
        ],
        time=[
            {"shape": (8, 4, 64, 64), "num_codes": 32768},  # Emu3: eight images of 512 x 512
            {"shape": (1, 4, 90, 90), "num_codes": 32768},  # Emu3: one image of 720 x 720
        ],
        bytes_moved=bytes_moved,
        flops=flops,
        constants=("z", "codebook"),
    ),
}
