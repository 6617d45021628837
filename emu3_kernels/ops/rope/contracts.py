"""What the compiled Triton kernels of rope and rope_append are held to."""

import torch
from torch import Tensor

from emu3_kernels.ops.rope.triton import append, rotate
from emu3_kernels.runtime.contracts import Config, Contract, meta

# 64 registers keep 32 programs of one warp, all that a multiprocessor takes, in half of its 65,536.
# Narrow loads are cos and sin, the 64 float32 of a token over the threads of a warp, and its
# position and slot.
EARLIER = {"sm_100, triton 3.6: registers": "68: 28 programs of one warp, of the 32 it could hold"}
TABLES = {"rope_kernel": Contract(max_registers=64, scalar_loads=2, exceptions=EARLIER)}
FEW = "a program has 8 heads of one token"
TABLES_AND_POSITION = {
    "rope_kernel": Contract(max_registers=64, scalar_loads=3, few_programs=FEW, exceptions=EARLIER)
}
APPEND = {
    "rope_append_kernel": Contract(
        max_registers=64, scalar_loads=4, few_programs=FEW,
        exceptions={"sm_100, triton 3.6: registers": "68, two programs less on a multiprocessor"},
    )
}  # fmt: skip


def _packed(batch: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Emu3-8B: 32 query heads and 8 KV heads of 128 in one projection, and the tables."""
    heads = meta(batch, tokens, 48, 128).split((32, 8, 8), dim=2)
    return list(heads), [meta(131072, 64, dtype=torch.float32) for _ in range(2)]


def _rotate(tokens: int, positions: Tensor | None, *, inverse: bool) -> None:
    (q, k, _), tables = _packed(1, tokens)
    rotate(q, k, *tables, positions, inverse=inverse)


def _append(batch: int, tokens: int) -> None:
    heads, tables = _packed(batch, tokens)
    caches = (meta(batch, 4096, 8, 128) for _ in range(2))
    indices = (meta(batch, tokens, dtype=torch.int64) for _ in range(2))
    append(*heads, *tables, *caches, *indices)


CONFIGS = {
    "rope": (
        Config("2048, packed", lambda: _rotate(2048, None, inverse=False), TABLES),
        Config("2048, packed, inverse", lambda: _rotate(2048, None, inverse=True), TABLES),
        Config(
            "1, packed, at its position",
            lambda: _rotate(1, meta(1, 1, dtype=torch.int64), inverse=False),
            TABLES_AND_POSITION,
        ),
    ),
    "rope_append": (
        Config("1, packed", lambda: _append(1, 1), APPEND),
        Config("16 rows of 1, packed", lambda: _append(16, 1), APPEND),
        Config("2 rows of 1024, packed", lambda: _append(2, 1024), APPEND),
    ),
}
