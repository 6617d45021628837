"""The sums of a causal convolution's backward pass in Triton, each in one order.

B batch, C channels in, O channels out, R rows of partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.conv3d.plan import volume
from emu3_kernels.ops.conv3d.triton_gemm import MOST_IN_PLACE, padded_channels
from emu3_kernels.runtime.launch import (
    INTERPRETED,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch,
    launch_planned,
    next_power_of_2,
    plan_launch,
    planned,
    tile,
)


def has_few_rows(weight: torch.Size) -> bool:
    """Return whether a kernel that is short of registers can sum dz beside its GEMM."""
    return max(weight[:2]) <= MOST_IN_PLACE


def add_sums(
    sums: Tensor | None,
    parts: Tensor | None,
    dz: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return dweight, dbias, dscale, dshift; None where there are no sums."""
    dweight = dbias = dscale = dshift = None
    if parts is None and sums is None:
        return dweight, dbias, dscale, dshift
    if parts is not None:
        dweight = torch.empty_like(weight)
        if bias is not None and has_few_rows(weight.shape):
            dbias = torch.empty_like(bias)
    if sums is not None:
        dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
    of_weight, of_norm = (sums if parts is None else parts), (parts if sums is None else sums)
    of_add = plan_add(
        of_weight.shape, of_norm.shape, weight.shape, parts is not None, sums is not None
    )  # fmt: skip
    launch_planned(
        causal_conv3d_bwd_add_kernel, of_add, of_weight, of_norm, dweight, dbias, dscale, dshift
    )  # fmt: skip
    if parts is not None and bias is not None and dbias is None:
        dbias = column_sums(dz.flatten(0, 1), bias.dtype)[: len(bias)]
    return dweight, dbias, dscale, dshift


@planned
def plan_add(
    parts: torch.Size, sums: torch.Size, weight: torch.Size, has_parts: bool, has_sums: bool
) -> LaunchPlan:
    (num_ranges, rows, width), (num_rows, _, norm_width) = parts, sums
    out_channels, channels, *_ = weight
    options = tile(num_warps=4, ROWS=16, BLOCK=64)
    blocks = cdiv(rows * width, options["BLOCK"]) if has_parts else 0
    num_sums = 2 * channels if has_sums else 0
    return plan_launch(
        (blocks + num_sums,), num_ranges, num_rows, blocks, out_channels, channels, width,
        norm_width, CHANNELS=padded_channels(channels), TAPS=volume(weight),
        HAS_PARTS=has_parts, HAS_SUMS=has_sums, **options,
    )  # fmt: skip


def column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum ``[R, N]`` over R in float32, in an order that R alone determines; round to ``dtype``."""
    chunk, (num_rows, width) = 512, rows.shape
    if num_rows == 1 and rows.dtype == dtype:
        return rows[0]
    block = min(next_power_of_2(width), 4096 if INTERPRETED else 128)
    num_chunks = cdiv(num_rows, chunk)
    sums = rows.new_empty(num_chunks, width, dtype=dtype if num_chunks == 1 else torch.float32)
    grid = (num_chunks * cdiv(width, block),)
    options = tile(max(block // 32, 1), CHUNK=chunk, ROWS=gpu_of(rows).warp_size, BLOCK=block)
    launch(causal_conv3d_sum_kernel, grid, rows, sums, num_rows, WIDTH=width, **options)
    return column_sums(sums, dtype)


@triton.jit
def _add_parts(
    parts_ptr, dweight_ptr, dbias_ptr, num_parts, block, out_channels, in_channels, columns,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = (TAPS * CHANNELS + 1) * columns
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_parts, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_parts)[:, None] & (at < size)[None, :]
        total += tl.load(parts_ptr + row[:, None] * size + at[None, :], mask=inside, other=0)
    value = tl.sum(total, axis=0)
    n, m = at % columns, at // columns
    tap, c = m // CHANNELS, m % CHANNELS
    exists = (tap < TAPS) & (c < in_channels) & (n < out_channels)
    out = dweight_ptr + (n * in_channels + c) * TAPS + tap
    tl.store(out, value.to(dweight_ptr.dtype.element_ty), mask=exists)
    if dbias_ptr is not None:
        is_bias = (m == TAPS * CHANNELS) & (n < out_channels)
        tl.store(dbias_ptr + n, value.to(dbias_ptr.dtype.element_ty), mask=is_bias)


@triton.jit
def _add_sums(sums_ptr, dscale_ptr, dshift_ptr, num_sums, which, c, columns, BLOCK: tl.constexpr):
    # Few numbers that cancel: the sums of blocks have errors enough.
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_sums, BLOCK):
        row = first + tl.arange(0, BLOCK)
        at = (row.to(tl.int64) * 2 + which) * columns + c
        total += tl.load(sums_ptr + at, mask=row < num_sums, other=0).to(tl.float64)
    value = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dscale_ptr + c, value.to(dscale_ptr.dtype.element_ty))
    else:
        tl.store(dshift_ptr + c, value.to(dshift_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_parts", "num_sums", "blocks"])
def causal_conv3d_bwd_add_kernel(
    parts_ptr, sums_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr, num_parts, num_sums,
    blocks, out_channels, in_channels, columns, sums_columns,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias, the sums of parts, from the first programs; then dscale and dshift."""
    program = tl.program_id(0)
    if HAS_PARTS:  # noqa: SIM102 (known when compiled)
        if program < blocks:
            _add_parts(
                parts_ptr, dweight_ptr, dbias_ptr, num_parts, program, out_channels, in_channels,
                columns, CHANNELS, TAPS, ROWS, BLOCK,
            )  # fmt: skip
    if HAS_SUMS:  # noqa: SIM102
        if program >= blocks:
            which, c = (program - blocks) // in_channels, (program - blocks) % in_channels
            _add_sums(
                sums_ptr, dscale_ptr, dshift_ptr, num_sums, which, c, sums_columns, ROWS * BLOCK
            )


@triton.jit
def causal_conv3d_sum_kernel(
    rows_ptr, sums_ptr, num_rows, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of the rows."""
    num_blocks = tl.cdiv(WIDTH, BLOCK)
    c = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    chunk = (tl.program_id(0) // num_blocks).to(tl.int64)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (c < WIDTH)[None, :]
        offsets = row[:, None].to(tl.int64) * WIDTH + c[None, :]
        sums += tl.load(rows_ptr + offsets, mask=inside, other=0).to(tl.float32)
    total = tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + chunk * WIDTH + c, total, mask=c < WIDTH)
