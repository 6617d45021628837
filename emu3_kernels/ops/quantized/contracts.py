"""The compiled launches of quantized_linear, and what their machine code must keep."""

from dataclasses import replace
from functools import partial

import torch

from emu3_kernels.ops.quantized.triton import forward
from emu3_kernels.runtime.contracts import Config, Contract, meta


def _linear(num_in: int, num_out: int, group_size: int = 0, num_rows: int = 2) -> None:
    """Emu3-8B's projections of one token of a guidance pair."""
    if group_size:
        codes = meta(num_out, num_in // 2, dtype=torch.uint8)
        scales = meta(num_out, num_in // group_size)
    else:
        codes = meta(num_out, num_in, dtype=torch.int8)
        scales = meta(num_out, dtype=torch.float32)
    forward(meta(num_rows, num_in), codes, scales)


AMD = {
    "gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950",
    "gfx942: stores": "v_mfma leaves a thread four outputs side by side: 8 bytes",
}
# 128 registers keep eight programs of 64 threads on a multiprocessor. Scalars are the scales: of
# int8 one at the end, of int4 one a step for each row of a thread. A step of int4 is a group, so
# that x is read in pieces of 16 inputs, and 8 bytes a thread.
INT8 = Contract(
    max_registers=128, scalar_loads=2, tensor_cores=True, async_copies=True, exceptions=AMD
)
INT4 = replace(
    INT8,
    access_bytes=8,
    scalar_loads=4,
    exceptions={"gfx942: async_copies": AMD["gfx942: async_copies"]},
)
SMALL_GROUPS = {"gfx942: loads": "16 bytes of codes a row for 64 threads: 4 bytes each"}
INT4_32 = replace(INT4, exceptions={**INT4.exceptions, **SMALL_GROUPS})


def _config(name: str, contract: Contract, *shape: int) -> Config:
    return Config(name, partial(_linear, *shape), {"quantized_linear_kernel": contract})


CONFIGS = {
    "quantized_linear": (
        _config("int8_qkv", INT8, 4096, 6144),
        _config("int8_down", INT8, 14336, 4096),
        _config("int8_head", INT8, 4096, 32768),
        _config("int8_window", INT8, 4096, 4096, 0, 16),
        _config("int4_qkv", INT4, 4096, 6144, 64),
        _config("int4_gate_up", INT4, 4096, 28672, 64),
        _config("int4_128_down", INT4, 14336, 4096, 128),
        _config("int4_32_out", INT4_32, 4096, 4096, 32),
    ),
}
