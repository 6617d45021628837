"""What the compiled Triton kernels of rms_norm and add_rms_norm are held to."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from emu3_kernels.ops.norm.triton import backward, forward
from emu3_kernels.runtime.contracts import Config, Contract, meta

# 256 threads of 64 registers keep 32 warps on a multiprocessor; of 512 threads it holds one block
# at 128. The scalar is rstd: one float32 a row.
FORWARD = Contract(max_registers=64, scalar_stores=1)
FORWARD_16384 = Contract(max_registers=128, scalar_stores=1)
TWO_PASS = Contract(max_registers=64, scalar_loads=1)
# One program a multiprocessor: the 128 registers that 512 threads may have. Rows are copied ahead
# to shared memory, on gfx942 to registers. rstd is loaded once a stage.
ROWS_AHEAD = Contract(
    max_registers=128,
    scalar_loads=3,
    async_copies=True,
    exceptions={"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"},
)
# The sum leaves one column a thread: 8 KiB are written in narrow stores, 2 MiB read in wide loads.
SUM = Contract(
    max_registers=64, scalar_stores=1, few_programs="4 MiB at most, a program for each 128 columns"
)
BACKWARD = {"rms_norm_bwd_kernel": ROWS_AHEAD, "rms_norm_sum_dweight_kernel": SUM}
BACKWARD_TWO_PASS = {
    "rms_norm_bwd_dx_kernel": TWO_PASS,
    "rms_norm_bwd_dweight_kernel": TWO_PASS,
    "rms_norm_sum_dweight_kernel": SUM,
}


def run_forward(
    num_rows: int, width: int, *, residual: bool, dropout: bool = False, of_rank: bool = False
) -> None:
    x = meta(num_rows, width)
    forward(x, x if residual else None, meta(width), 1e-5, *_random(num_rows, dropout, of_rank))


def run_backward(
    num_rows: int, width: int, *, residual: bool, dropout: bool = False, of_rank: bool = False
) -> None:
    x, rstd = meta(num_rows, width), meta(num_rows, dtype=torch.float32)
    random = _random(num_rows, dropout, of_rank)
    backward(x, x if residual else None, x, meta(width), rstd, *random)


def _random(
    num_rows: int, dropout: bool, of_rank: bool
) -> tuple[float, Tensor | None, Tensor | None]:
    """Return p, the seed and, of a rank, the rows of the mask."""
    if not dropout:
        return 0.0, None, None
    return 0.1, meta(dtype=torch.int64), meta(num_rows, dtype=torch.int64) if of_rank else None


# Emu3's width, the widest rows in registers, and wider ones.
SHAPES = (
    (run_forward, 4096, 4096, {"rms_norm_fwd_kernel": FORWARD}),
    (run_forward, 1024, 16384, {"rms_norm_fwd_kernel": FORWARD_16384}),
    (run_forward, 512, 32768, {"rms_norm_fwd_two_pass_kernel": FORWARD}),
    (run_backward, 4096, 4096, BACKWARD),
    (run_backward, 2048, 8192, BACKWARD),
    (run_backward, 512, 32768, BACKWARD_TWO_PASS),
)


def _config(
    run: Callable, num_rows: int, width: int, contracts: dict[str, Contract], *, residual: bool
) -> Config:
    call = partial(run, num_rows, width, residual=residual)
    return Config(f"{num_rows} x {width}", call, contracts)


PHILOX = {
    ("4096 x 4096", "rms_norm_bwd_kernel"): {
        "sm_80, triton 3.6: registers": "181: one program of 256 threads an SM, all there are"
    }
}


def _with_dropout(config: Config, *, of_rank: bool = False) -> Config:
    """The seed is one more scalar, and so is the row of the mask of each row ahead."""
    contracts = {
        name: replace(
            contract,
            scalar_loads=contract.scalar_loads + (4 if of_rank else 1),
            exceptions={**contract.exceptions, **PHILOX.get((config.name, name), {})},
        )
        for name, contract in config.contracts.items()
    }
    name = f"{config.name}, dropout{' of a rank' if of_rank else ''}"
    return Config(name, partial(config.call, dropout=True, of_rank=of_rank), contracts)


_ADD = tuple(_config(*shape, residual=True) for shape in SHAPES)
CONFIGS = {
    "rms_norm": tuple(_config(*shape, residual=False) for shape in SHAPES),
    "add_rms_norm": (
        *_ADD,
        *map(_with_dropout, _ADD),
        *(_with_dropout(config, of_rank=True) for config in (_ADD[0], _ADD[3])),
    ),
}
