"""Sizes of quantized_linear that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.ops.quantized.codes import quantize
from emu3_kernels.runtime.cases import Cases


def make(
    *,
    num_rows: int,
    num_in: int,
    num_out: int,
    bits: str = "int8",
    group_size: int = 64,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor]:
    """Normal inputs, and a normal weight whose outputs and groups differ in size."""
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_rows, num_in, generator=random, device=device)
    weight = torch.randn(num_out, num_in, generator=random, device=device)
    weight *= torch.rand(num_out, 1, generator=random, device=device)
    codes, scales = quantize(weight / num_in**0.5, bits, group_size)
    return {"x": x.to(dtype), "codes": codes, "scales": scales}


def weight_bytes(*, num_in: int, num_out: int, bits: str = "int8", group_size: int = 64) -> int:
    """Codes and scales."""
    if bits == "int8":
        return num_out * (num_in + 4)
    return num_out * (num_in // 2 + num_in // group_size * 2)


def bytes_moved(*, num_rows: int, num_in: int, num_out: int, dtype: torch.dtype, **how) -> int:
    """Traffic that no implementation can avoid: codes, scales and x once, y once."""
    weight = weight_bytes(num_in=num_in, num_out=num_out, **how)
    return weight + num_rows * (num_in + num_out) * dtype.itemsize


def _shape(num_in: int, num_out: int, **how) -> dict:
    return {"num_rows": 2, "num_in": num_in, "num_out": num_out, **how}


# Emu3-8B: q, k and v; out; gate and up; down; the visual rows of the head.
PROJECTIONS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 32768))

CASES = {
    "quantized_linear": Cases(
        make=make,
        check=[
            {"num_rows": 0, "num_in": 32, "num_out": 4},
            {"num_rows": 1, "num_in": 37, "num_out": 5},  # odd: no vector is whole
            {"num_rows": 3, "num_in": 96, "num_out": 7, "bits": "int4", "group_size": 32},
            {"num_rows": 15, "num_in": 704, "num_out": 43, "bits": "int4"},  # 8 + 4 + 2 + 1 rows
            {"num_rows": 15, "num_in": 4500, "num_out": 67},  # chunks of inputs, ragged
            {"num_rows": 1, "num_in": 4736, "num_out": 34, "bits": "int4", "group_size": 128},
            {"num_rows": 2, "num_in": 4224, "num_out": 130, "bits": "int4", "group_size": 32},
            {"num_rows": 40, "num_in": 192, "num_out": 70, "bits": "int4"},  # a GEMM
            {"num_rows": 16, "num_in": 1024, "num_out": 515},
        ],
        decode=[_shape(*shape, bits=bits) for shape in PROJECTIONS for bits in ("int8", "int4")],
        bytes_moved=bytes_moved,
        constants=("x", "scales"),
        cpu_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
}
