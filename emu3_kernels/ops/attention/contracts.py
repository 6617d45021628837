"""attention in Triton: emu3_kernels/_attention/{forward,backward}launch.py."""

from dataclasses import replace

import torch
from torch import Tensor

from emu3_kernels.ops.attention import triton_blocks as blocks_triton
from emu3_kernels.ops.attention.spans import Dropout, Spans
from emu3_kernels.ops.attention.triton_backward import backward
from emu3_kernels.ops.attention.triton_forward import forward
from emu3_kernels.runtime.launch import Config, Contract, meta

__all__ = ["CONFIGS", "backward", "forward", "why_not"]


def why_not(q: Tensor, *_: object) -> str | None:
    return blocks_triton.why_not(q)


def _emu3(width: int, *, backwards: bool = False, drops: bool = False) -> None:
    """Emu3-8B: 32 heads of q, 8 of k and of v in one projection of 8,192 tokens."""
    q, k, v = meta(1, 8192, 48, width).split((32, 8, 8), dim=2)
    spans = Spans(*(meta(1, 8192, dtype=torch.int32) for _ in range(2)))
    places = (meta(8192, dtype=torch.int32) for _ in range(2))
    dropout = Dropout(0.1, meta(dtype=torch.int64), *places) if drops else None
    if backwards:
        dout, lse = meta(1, 8192, 32, width), meta(1, 32, 8192, dtype=torch.float32)
        backward(dout, q, k, v, lse, lse, spans, width**-0.5, dropout, wide=False)
    else:
        forward(q, k, v, spans, width**-0.5, dropout, wide=False)


# Of 65,536 registers, 255 a thread leave room for one program of 256 threads, which _fwd_kernel and
# _bwd_k_kernel have, and for two of 128, which _bwd_q_kernel has; a thread of gfx942 may have 512.
# Narrow are the spans, lse, delta and places of rows: of 64 queries, a thread may have 32.
AMD = {
    "gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950",
    "gfx942: stores": "v_mfma leaves a thread four channels side by side: 8 bytes",
}
PRODUCTS = Contract(max_registers=255, tensor_cores=True, async_copies=True, exceptions=AMD)
FORWARD = {"_fwd_kernel": replace(PRODUCTS, scalar_loads=12, scalar_stores=1)}
BACKWARD = {
    "_bwd_q_kernel": replace(PRODUCTS, scalar_loads=24),
    "_bwd_k_kernel": replace(PRODUCTS, scalar_loads=74),
}
SCALAR_SPILLS = {"gfx942: spills": "a few scalar registers, into vector registers: none to memory"}
DROPS_FORWARD = {"_fwd_kernel": replace(PRODUCTS, scalar_loads=20, scalar_stores=1)}
DROPS_BACKWARD = {
    "_bwd_q_kernel": replace(PRODUCTS, max_registers=272, scalar_loads=40),
    "_bwd_k_kernel": replace(PRODUCTS, scalar_loads=80, exceptions=AMD | SCALAR_SPILLS),
}
CONFIGS = (
    Config("8192, 32:8 heads of 128", lambda: _emu3(128), FORWARD),
    Config("8192, 32:8 heads of 64", lambda: _emu3(64), FORWARD),
    Config("8192, 32:8 heads of 128", lambda: _emu3(128, backwards=True), BACKWARD),
    Config("8192, 32:8 heads of 64", lambda: _emu3(64, backwards=True), BACKWARD),
    Config("8192, dropout", lambda: _emu3(128, drops=True), DROPS_FORWARD),
    Config("8192, dropout", lambda: _emu3(128, drops=True, backwards=True), DROPS_BACKWARD),
)
