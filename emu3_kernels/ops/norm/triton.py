"""RMSNorm of rows in Triton, with or without a residual: both ops of the family. See api.py.

A row of D channels is held in registers and read once, up to 16384 channels in the forward pass
and 8192 in the backward pass, whose sums need registers too; a wider row is read twice. R rows,
P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime import triton_dropout
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import (
    cdiv,
    gpu_of,
    launch,
    next_power_of_2,
    tile,
    why_not_triton,
)

MAX_FORWARD, MAX_BACKWARD = 16384, 8192


def row_tile(block: int, with_dropout: bool = False) -> dict[str, int | bool]:
    """Hold a row in registers: 16 elements a thread up to 8192, so that every access has 16 bytes.

    Stages are the rows in flight in the backward pass: two ahead up to 4096 channels (32 KiB in
    bfloat16); one ahead beyond, where float32 would need more shared memory than sm_80 has; and
    one with dropout, whose random words take the registers of the second.
    """
    num_stages = 3 if block <= 4096 and not with_dropout else 2
    return tile(min(max(block // 512, 1), 16), num_stages, BLOCK=block)


_BLOCKS = [1 << i for i in range(MAX_FORWARD.bit_length())]
ROW_TILES = {block: row_tile(block) for block in _BLOCKS}
DROPOUT_ROW_TILES = {block: row_tile(block, with_dropout=True) for block in _BLOCKS}
TWO_PASS_TILE = tile(8, BLOCK=4096)
# Narrow blocks, so that 4096 channels are 256 programs; a row of one is two sectors of 32 bytes.
SUM_TILE = tile(4, BLOCK=16, ROWS=128)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    reason = why_not_triton(x)
    if reason is None and weight.dtype != x.dtype:
        reason = why_not_triton(weight)
    return reason


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dropout_rows: Tensor | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block is read before it is written: ``out`` may be ``x`` and ``residual``."""
    num_rows, width = x.shape
    if out is not None:
        y, summed = out
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        summed = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    if num_rows and width:
        if width <= MAX_FORWARD:
            kernel, options = rms_norm_fwd_kernel, ROW_TILES[next_power_of_2(width)]
        else:
            kernel, options = rms_norm_fwd_two_pass_kernel, TWO_PASS_TILE
        residual_stride = 0 if residual is None else residual.stride(0)
        launch(
            kernel, (num_rows,), x, residual, weight, y, summed, rstd, x.stride(0),
            residual_stride, width, eps, *triton_dropout.arguments(dropout_p, seed), dropout_rows,
            **options,
        )  # fmt: skip
    return y, x if residual is None else summed, rstd


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sum dweight in an order fixed by P and R alone.

    ``dsummed`` is added to dx and to dresidual, which are one tensor without dropout.
    """
    num_rows, width = summed.shape
    dx = torch.empty_like(summed, memory_format=torch.contiguous_format)
    dropped = None if seed is None else torch.empty_like(dx)
    dresidual = None if dsummed is None else dx if dropped is None else dropped
    if not (num_rows and width):
        return dx, dresidual, torch.zeros_like(weight)
    if width <= MAX_BACKWARD:
        tiles = ROW_TILES if seed is None else DROPOUT_ROW_TILES
        options = tiles[next_power_of_2(width)]
    else:
        options = TWO_PASS_TILE
    # Sixteen warps a multiprocessor: 147 us at 8192 x 4096, measured on an H200; 183 with eight.
    # Each program writes one row of partial sums.
    num_programs = min(num_rows, gpu_of(dy).num_sms * max(16 // options["num_warps"], 1))
    partials = summed.new_empty(num_programs, width, dtype=torch.float32)
    strides = (dy.stride(0), 0 if dsummed is None else dsummed.stride(0), summed.stride(0))
    dropout = *triton_dropout.arguments(dropout_p, seed), dropout_rows
    if width <= MAX_BACKWARD:
        launch(
            rms_norm_bwd_kernel, (num_programs,), dy, dsummed, summed, weight, rstd, dx, dropped,
            partials, *strides, num_rows, width, *dropout, STAGES=options["num_stages"], **options,
        )  # fmt: skip
    else:
        launch(
            rms_norm_bwd_dx_kernel, (num_rows,), dy, dsummed, summed, weight, rstd, dx, dropped,
            *strides, width, *dropout, **options,
        )  # fmt: skip
        launch(
            rms_norm_bwd_dweight_kernel, (cdiv(width, options["BLOCK"]), num_programs),
            dy, summed, rstd, partials, dy.stride(0), summed.stride(0), num_rows, width, **options,
        )  # fmt: skip
    dweight = torch.empty_like(weight)
    launch(
        rms_norm_sum_dweight_kernel, (cdiv(width, SUM_TILE["BLOCK"]),),
        partials, dweight, num_programs, width, **SUM_TILE,
    )  # fmt: skip
    return dx, dresidual, dweight


@triton.jit
def _load(ptr, c, inside):
    return tl.load(ptr + c, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(ptr, c, value, inside):
    tl.store(ptr + c, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dropout_row(rows_ptr, row):
    if rows_ptr is None:
        return row
    else:  # noqa: RET505 (Triton compiles what follows a branch that returns)
        return tl.load(rows_ptr + row)


@triton.jit
def _drop(x, row, c, seed, drop_below, scale):
    return tl.where(triton_dropout.keep(seed, drop_below, row, c, 0), x * scale, 0.0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, c, inside, row, seed, drop_below, scale):
    """dropout(x) + residual, rounded to the dtype of x as the returned sum is."""
    x = _load(x_ptr, c, inside)
    if seed is not None:
        x = _drop(x, row, c, seed, drop_below, scale)
    if residual_ptr is not None:
        x = (x + _load(residual_ptr, c, inside)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, summed_ptr, rstd_ptr, x_stride, residual_stride,
    width, eps, seed_ptr, drop_below, scale, dropout_rows_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * rstd * weight;  rstd = rsqrt(mean(x**2) + eps)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    x_ptr += row * x_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    dropout_row = _dropout_row(dropout_rows_ptr, row)
    x = _load_sum(x_ptr, residual_ptr, c, inside, dropout_row, seed, drop_below, scale)
    weight = _load(weight_ptr, c, inside)
    rstd = tl.rsqrt(tl.sum(x * x) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    _store(y_ptr + row * width, c, x * rstd * weight, inside)
    if summed_ptr is not None:
        _store(summed_ptr + row * width, c, x, inside)


@triton.jit
def rms_norm_fwd_two_pass_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, summed_ptr, rstd_ptr, x_stride, residual_stride,
    width, eps, seed_ptr, drop_below, scale, dropout_rows_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward of a row too wide for registers: one pass for rstd, one for y."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    dropout_row = _dropout_row(dropout_rows_ptr, row)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = _load_sum(x_ptr, residual_ptr, c, c < width, dropout_row, seed, drop_below, scale)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        x = _load_sum(x_ptr, residual_ptr, c, inside, dropout_row, seed, drop_below, scale)
        _store(y_ptr + row * width, c, x * rstd * _load(weight_ptr, c, inside), inside)
        if summed_ptr is not None:
            _store(summed_ptr + row * width, c, x, inside)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, dsummed_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    dy_stride, dsummed_stride, x_stride, num_rows, width, seed_ptr, drop_below, scale,
    dropout_rows_ptr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (dnormed - normed * mean(dnormed * normed));  dnormed = dy * weight.

    Each program takes every P-th row and sums dy * normed over them: a partial sum of dweight.
    """
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    weight = _load(weight_ptr, c, inside)
    dweight = tl.zeros([BLOCK], tl.float32)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
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
            dropout_row = _dropout_row(dropout_rows_ptr, row)
            dx = _drop(dx, dropout_row, c, seed, drop_below, scale)
        _store(dx_ptr + row * width, c, dx, inside)
    _store(partials_ptr + program * width, c, dweight, inside)


@triton.jit
def rms_norm_bwd_dx_kernel(
    dy_ptr, dsummed_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
    dy_stride, dsummed_stride, x_stride, width, seed_ptr, drop_below, scale, dropout_rows_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row too wide for registers: one pass for the mean, one for dx."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    dy_ptr += row * dy_stride
    if dsummed_ptr is not None:
        dsummed_ptr += row * dsummed_stride
    rstd = tl.load(rstd_ptr + row)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    dropout_row = _dropout_row(dropout_rows_ptr, row)
    dots = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        dnormed = _load(dy_ptr, c, inside) * _load(weight_ptr, c, inside)
        dots += dnormed * _load(x_ptr, c, inside) * rstd
    mean = tl.sum(dots) / width
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        dnormed = _load(dy_ptr, c, inside) * _load(weight_ptr, c, inside)
        dx = rstd * (dnormed - _load(x_ptr, c, inside) * rstd * mean)
        if dsummed_ptr is not None:
            dx += _load(dsummed_ptr, c, inside)
        if seed is not None:
            _store(dresidual_ptr + row * width, c, dx, inside)
            dx = _drop(dx, dropout_row, c, seed, drop_below, scale)
        _store(dx_ptr + row * width, c, dx, inside)


@triton.jit
def rms_norm_bwd_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, partials_ptr, dy_stride, x_stride, num_rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a partial sum of dweight: dy * normed over every P-th row."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    program = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, num_rows, tl.num_programs(1)):
        normed = _load(x_ptr + row * x_stride, c, inside) * tl.load(rstd_ptr + row)
        dweight += _load(dy_ptr + row * dy_stride, c, inside) * normed
    _store(partials_ptr + program * width, c, dweight, inside)


@triton.jit
def rms_norm_sum_dweight_kernel(
    partials_ptr, dweight_ptr, num_partials, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dweight = the sum of the partial sums, rounded once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_partials, ROWS):
        partial = first + tl.arange(0, ROWS)
        inside = (partial[:, None] < num_partials) & (c[None, :] < width)
        offsets = partial[:, None].to(tl.int64) * width + c[None, :]
        dweight += tl.sum(_load(partials_ptr, offsets, inside), axis=0)
    _store(dweight_ptr, c, dweight, c < width)


BACKENDS = dict.fromkeys(("rms_norm", "add_rms_norm"), Backend(why_not, forward, backward))
