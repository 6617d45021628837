"""swiglu in Triton: element-wise over blocks of one row."""

import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import Config, Contract, Tile, meta, why_not_triton

# 16 elements a thread with warps of 32 lanes, 8 (the 16 bytes of one access) with 64.
TILE = Tile(block=1024, num_warps=2)

# 64 registers keep 32 warps on a multiprocessor of 65,536: half of what it can hold.
CONFIGS = (
    Config(
        "2048 x 14336, packed",
        lambda: forward(*meta(2048, 2 * 14336).chunk(2, dim=-1)),
        {"_fwd_kernel": Contract(max_registers=64)},
    ),
    Config(
        "1 x 14336, one decoded token",
        lambda: forward(meta(1, 14336), meta(1, 14336)),
        {"_fwd_kernel": Contract(max_registers=64)},
    ),
    Config(
        "2048 x 14336, packed",
        lambda: backward(meta(2048, 14336), *meta(2048, 2 * 14336).chunk(2, dim=-1)),
        {"_bwd_kernel": Contract(max_registers=64)},
    ),
)


def why_not(gate: Tensor, up: Tensor) -> str | None:
    return why_not_triton(gate)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    num_rows, width = gate.shape
    out = gate.new_empty(num_rows, width)
    if out.numel():
        grid = (num_rows, triton.cdiv(width, TILE.block))
        strides = (gate.stride(0), up.stride(0))
        _fwd_kernel[grid](gate, up, out, *strides, width, **TILE.options())
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    num_rows, width = gate.shape
    dgate_up = gate.new_empty(num_rows, 2 * width)
    if dgate_up.numel():
        grid = (num_rows, triton.cdiv(width, TILE.block))
        strides = (dout.stride(0), gate.stride(0), up.stride(0))
        _bwd_kernel[grid](dout, gate, up, dgate_up, *strides, width, **TILE.options())
    return dgate_up


@triton.jit
def _fwd_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """out = gate * sigmoid(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    gate = tl.load(gate_ptr + row * gate_stride + c, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + c, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + c, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bwd_kernel(
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
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dout * gate * sigmoid
    dgate_ptr = dgate_up_ptr + row * 2 * width
    tl.store(dgate_ptr + c, dgate.to(dgate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + width + c, dup.to(dgate_up_ptr.dtype.element_ty), mask=inside)
