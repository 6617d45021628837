"""swiglu in Triton: element-wise over blocks of one row. See api.py for the arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, tile, why_not_triton
from emu3_kernels.runtime.triton_silu import sigmoid, silu

# 16 elements a thread with warps of 32 threads, 8 (the 16 bytes of one access) with 64.
BLOCK = 1024
TILE = tile(2, BLOCK=BLOCK)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    num_rows, width = gate.shape
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if num_rows and width:
        grid = num_rows, cdiv(width, BLOCK)
        launch(swiglu_fwd_kernel, grid, gate, up, out, gate.stride(0), up.stride(0), width, **TILE)
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    num_rows, width = gate.shape
    dgate_up = gate.new_empty(num_rows, 2 * width)
    if num_rows and width:
        grid = num_rows, cdiv(width, BLOCK)
        strides = dout.stride(0), gate.stride(0), up.stride(0)
        launch(swiglu_bwd_kernel, grid, dout, gate, up, dgate_up, *strides, width, **TILE)
    return dgate_up


@triton.jit
def swiglu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr
):
    """out = gate * sigmoid(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    gate = tl.load(gate_ptr + row * gate_stride + c, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + c, mask=inside).to(tl.float32)
    out = silu(gate) * up
    tl.store(out_ptr + row * width + c, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_up_ptr, dout_stride, gate_stride, up_stride, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dup = dout * silu(gate);  dgate = dout * up * silu'(gate)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    dout = tl.load(dout_ptr + row * dout_stride + c, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + c, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + c, mask=inside).to(tl.float32)
    of_gate = sigmoid(gate)
    dgate = dout * up * of_gate * (1 + gate * (1 - of_gate))
    dup = dout * gate * of_gate
    dgate_ptr = dgate_up_ptr + row * 2 * width
    tl.store(dgate_ptr + c, dgate.to(dgate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + width + c, dup.to(dgate_up_ptr.dtype.element_ty), mask=inside)


BACKENDS = dict.fromkeys(("swiglu", "swiglu_packed"), Backend(why_not_triton, forward, backward))
