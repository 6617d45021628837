"""RMSNorm of rows in Triton, with or without a residual: what rms_norm and add_rms_norm share.

A row of D channels stays in registers, read once, up to 16384 channels forward and 8192 backward,
where it shares them with its sums; a wider one is walked over twice. R rows, P programs.
"""

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime import triton_dropout
from emu3_kernels.runtime.launch import (
    NUM_MULTIPROCESSORS,
    Config,
    Contract,
    Tile,
    meta,
    next_power_of_2,
)

MAX_FORWARD, MAX_BACKWARD = 16384, 8192
WIDE_TILE = Tile(block=4096, num_warps=8)
SUM_TILE = Tile(block=128, num_warps=4)

# 256 threads of 64 registers keep 32 warps on a multiprocessor; of 512 threads it holds one block
# at 128. The scalar is rstd: one float32 a row.
FORWARD = Contract(max_registers=64, scalar_stores=1)
FORWARD_16384 = Contract(max_registers=128, scalar_stores=1)
WIDE = Contract(max_registers=64, scalar_loads=1)
# One program a multiprocessor: the 128 registers that 512 threads may have. Rows are copied ahead
# of their turn, which is a register load on gfx942. rstd is loaded once a stage.
ROWS_AHEAD = Contract(
    max_registers=128,
    scalar_loads=3,
    async_copies=True,
    exceptions={"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"},
)
# The sum leaves one column a thread: 8 KiB are written narrow, 2 MiB read wide.
SUM = Contract(max_registers=64, scalar_stores=1)
BACKWARD = {"_bwd_kernel": ROWS_AHEAD, "_sum_kernel": SUM}
BACKWARD_WIDE = {"_bwd_wide_kernel": WIDE, "_bwd_weight_wide_kernel": WIDE, "_sum_kernel": SUM}


def row_tile(width: int, with_dropout: bool = False) -> Tile:
    """Hold a row: 16 elements a thread up to 8192, so that every access has 16 bytes.

    Stages are the rows that the backward pass has under way: two ahead up to 4096 channels (32 KiB
    in bfloat16); one beyond, where float32 would ask sm_80 for more shared memory than it has; and
    one with dropout, whose words are held in the registers that the second would take.
    """
    block = next_power_of_2(width)
    num_warps = min(max(block // 512, 1), 16)
    return Tile(block, num_warps, num_stages=3 if block <= 4096 and not with_dropout else 2)


def configs(with_residual: bool) -> tuple[Config, ...]:
    """Return the CONFIGS of an op: Emu3's width, the widest rows in registers, and a wider one."""

    def run_forward(num_rows: int, width: int, *dropout: float | Tensor) -> None:
        x = meta(num_rows, width)
        forward(x, x if with_residual else None, meta(width), 1e-5, *dropout)

    def run_backward(num_rows: int, width: int, *dropout: float | Tensor) -> None:
        x, rstd = meta(num_rows, width), meta(num_rows, dtype=torch.float32)
        backward(x, x if with_residual else None, x, meta(width), rstd, *dropout)

    launches = (
        (run_forward, 4096, 4096, {"_fwd_kernel": FORWARD}),
        (run_forward, 1024, 16384, {"_fwd_kernel": FORWARD_16384}),
        (run_forward, 512, 32768, {"_fwd_wide_kernel": FORWARD}),
        (run_backward, 4096, 4096, BACKWARD),
        (run_backward, 2048, 8192, BACKWARD),
        (run_backward, 512, 32768, BACKWARD_WIDE),
    )
    plain = (
        Config(f"{num_rows} x {width}", partial(run, num_rows, width), contracts)
        for run, num_rows, width, contracts in launches
    )
    dropped = (
        Config(
            f"{num_rows} x {width}, dropout",
            partial(run, num_rows, width, 0.1, meta(dtype=torch.int64)),
            # The seed is one more scalar.
            {name: replace(c, scalar_loads=c.scalar_loads + 1) for name, c in contracts.items()},
        )
        for run, num_rows, width, contracts in launches
        if with_residual
    )
    return *plain, *dropped


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the sum that was normalised (``x`` itself without a residual) and rstd ``[R]``."""
    y = x.new_empty(x.shape)
    summed = None if residual is None else torch.empty_like(y)
    rstd = forward_into(y, summed, x, residual, weight, eps, dropout_p, seed)
    return y, x if summed is None else summed, rstd


def forward_into(
    y: Tensor,
    summed: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return rstd. A block is read before it is written: y and summed may be x and residual."""
    num_rows, width = x.shape
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    if y.numel():
        kernel, tile = (
            (_fwd_kernel, row_tile(width))
            if width <= MAX_FORWARD
            else (_fwd_wide_kernel, WIDE_TILE)
        )
        strides = (x.stride(0), 0 if residual is None else residual.stride(0))
        kernel[(num_rows,)](
            x, residual, weight, y, summed, rstd, *strides, width, eps,
            *triton_dropout.arguments(dropout_p, seed), **tile.options(),
        )  # fmt: skip
    return rstd


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dresidual and dweight, summed in an order fixed by P and R alone.

    ``dsummed`` is added to both of the former, which are one tensor without dropout.
    """
    num_rows, width = x.shape
    dx = x.new_empty(num_rows, width)
    dresidual = None if seed is None else torch.empty_like(dx)
    if not dx.numel():
        return dx, dx if dresidual is None else dresidual, torch.zeros_like(weight)
    tile = row_tile(width, seed is not None) if width <= MAX_BACKWARD else WIDE_TILE
    # Eight warps a multiprocessor; each program writes one row of partials.
    num_programs = min(num_rows, NUM_MULTIPROCESSORS * max(8 // tile.num_warps, 1))
    partials = x.new_empty(num_programs, width, dtype=torch.float32)
    strides = (dy.stride(0), 0 if dsummed is None else dsummed.stride(0), x.stride(0))
    dropout = triton_dropout.arguments(dropout_p, seed)
    if width <= MAX_BACKWARD:
        _bwd_kernel[(num_programs,)](
            dy, dsummed, x, weight, rstd, dx, dresidual, partials, *strides, num_rows, width,
            *dropout, STAGES=tile.num_stages, **tile.options(),
        )  # fmt: skip
    else:
        _bwd_wide_kernel[(num_rows,)](
            dy, dsummed, x, weight, rstd, dx, dresidual, *strides, width, *dropout,
            **tile.options(),
        )  # fmt: skip
        _bwd_weight_wide_kernel[(triton.cdiv(width, tile.block), num_programs)](
            dy, x, rstd, partials, dy.stride(0), x.stride(0), num_rows, width, **tile.options()
        )
    dweight = torch.empty_like(weight)
    _sum_kernel[(triton.cdiv(width, SUM_TILE.block),)](
        partials, dweight, num_programs, width, ROWS=16, **SUM_TILE.options()
    )
    return dx, dx if dresidual is None else dresidual, dweight


@triton.jit
def _load(ptr, c, inside):
    return tl.load(ptr + c, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(ptr, c, value, inside):
    tl.store(ptr + c, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _drop(x, row, c, seed, drop_below, scale):
    return tl.where(triton_dropout.keep(seed, drop_below, row, c, 0), x * scale, 0.0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, c, inside, row, seed, drop_below, scale):
    """dropout(x) + residual, rounded to the dtype of x: what is normalised is what is returned."""
    x = _load(x_ptr, c, inside)
    if seed is not None:
        x = _drop(x, row, c, seed, drop_below, scale)
    if residual_ptr is not None:
        x = (x + _load(residual_ptr, c, inside)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, summed_ptr, rstd_ptr, x_stride, residual_stride,
    width, eps, seed_ptr, drop_below, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * rstd * weight;  rstd = rsqrt(mean(x**2) + eps)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    x_ptr += row * x_stride
    seed = triton_dropout.load_seed(seed_ptr)
    x = _load_sum(x_ptr, residual_ptr, c, inside, row, seed, drop_below, scale)
    weight = _load(weight_ptr, c, inside)
    rstd = tl.rsqrt(tl.sum(x * x) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    _store(y_ptr + row * width, c, x * rstd * weight, inside)
    if summed_ptr is not None:
        _store(summed_ptr + row * width, c, x, inside)


@triton.jit
def _fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, summed_ptr, rstd_ptr, x_stride, residual_stride,
    width, eps, seed_ptr, drop_below, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """The forward pass of a row that registers cannot hold: read for rstd, and read again."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    seed = triton_dropout.load_seed(seed_ptr)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = _load_sum(x_ptr, residual_ptr, c, c < width, row, seed, drop_below, scale)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        x = _load_sum(x_ptr, residual_ptr, c, inside, row, seed, drop_below, scale)
        _store(y_ptr + row * width, c, x * rstd * _load(weight_ptr, c, inside), inside)
        if summed_ptr is not None:
            _store(summed_ptr + row * width, c, x, inside)


@triton.jit
def _bwd_kernel(
    dy_ptr, dsummed_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    dy_stride, dsummed_stride, x_stride, num_rows, width, seed_ptr, drop_below, scale,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (dnormed - normed * mean(dnormed * normed));  dnormed = dy * weight.

    Each program takes every P-th row and sums dy * normed over them: a partial of dweight.
    """
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    weight = _load(weight_ptr, c, inside)
    dweight = tl.zeros([BLOCK], tl.float32)
    seed = triton_dropout.load_seed(seed_ptr)
    for row in tl.range(program, num_rows, tl.num_programs(0), num_stages=STAGES):
        rstd = tl.load(rstd_ptr + row)
        normed = _load(x_ptr + row * x_stride, c, inside) * rstd
        dy = _load(dy_ptr + row * dy_stride, c, inside)
        dweight += dy * normed
        dnormed = dy * weight
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed) / width))
        if dsummed_ptr is not None:
            dx += _load(dsummed_ptr + row * dsummed_stride, c, inside)
        if seed is not None:
            _store(dresidual_ptr + row * width, c, dx, inside)
            dx = _drop(dx, row, c, seed, drop_below, scale)
        _store(dx_ptr + row * width, c, dx, inside)
    _store(partials_ptr + program * width, c, dweight, inside)


@triton.jit
def _bwd_wide_kernel(
    dy_ptr, dsummed_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
    dy_stride, dsummed_stride, x_stride, width, seed_ptr, drop_below, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """The dx of a row that registers cannot hold: read for the mean, and read again."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    dy_ptr += row * dy_stride
    if dsummed_ptr is not None:
        dsummed_ptr += row * dsummed_stride
    rstd = tl.load(rstd_ptr + row)
    seed = triton_dropout.load_seed(seed_ptr)
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        dnormed = _load(dy_ptr, c, inside) * _load(weight_ptr, c, inside)
        products += dnormed * _load(x_ptr, c, inside) * rstd
    mean = tl.sum(products) / width
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        dnormed = _load(dy_ptr, c, inside) * _load(weight_ptr, c, inside)
        dx = rstd * (dnormed - _load(x_ptr, c, inside) * rstd * mean)
        if dsummed_ptr is not None:
            dx += _load(dsummed_ptr, c, inside)
        if seed is not None:
            _store(dresidual_ptr + row * width, c, dx, inside)
            dx = _drop(dx, row, c, seed, drop_below, scale)
        _store(dx_ptr + row * width, c, dx, inside)


@triton.jit
def _bwd_weight_wide_kernel(
    dy_ptr, x_ptr, rstd_ptr, partials_ptr, dy_stride, x_stride, num_rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a partial of dweight: dy * normed, summed over every P-th row."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    program = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, num_rows, tl.num_programs(1)):
        normed = _load(x_ptr + row * x_stride, c, inside) * tl.load(rstd_ptr + row)
        dweight += _load(dy_ptr + row * dy_stride, c, inside) * normed
    _store(partials_ptr + program * width, c, dweight, inside)


@triton.jit
def _sum_kernel(
    partials_ptr, dweight_ptr, num_partials, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dweight = the sum of the partials, rounded once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_partials, ROWS):
        partial = first + tl.arange(0, ROWS)
        inside = (partial[:, None] < num_partials) & (c[None, :] < width)
        offsets = partial[:, None].to(tl.int64) * width + c[None, :]
        dweight += tl.sum(_load(partials_ptr, offsets, inside), axis=0)
    _store(dweight_ptr, c, dweight, c < width)
