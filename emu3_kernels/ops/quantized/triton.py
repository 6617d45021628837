"""quantized_linear in Triton: codes are read once, by blocks of outputs and splits of the inputs.

Codes are converted to the dtype of x, which holds them exactly, and multiplied by tensor cores:
the outputs are the rows of the dot, and up to 16 rows of x are its columns. Programs that share
outputs store float32 sums; the one that counts last adds all of them, in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.quantized.codes import dequantize
from emu3_kernels.runtime.counters import counters
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.gemm import mm_
from emu3_kernels.runtime.launch import cdiv, gpu_of, launch, tile, why_not_triton

MAX_ROWS = 16
"""Columns of a dot; more rows of x are multiplied by a GEMM."""
BLOCK_N, BLOCK_K, NUM_WARPS, NUM_STAGES = 32, 128, 2, 4
"""With four warps sm_90 takes wgmma, whose operand in registers makes every step wait."""
WARPS_PER_SM = 16
"""Of 64: each program has three steps, of 1 to 4 KiB of codes, in flight."""
MIN_STEPS = 4
"""Of a split: fewer would wait for the first load most of the time."""
GEMM_TILE = 32 << 20
"""Elements of the weight that a GEMM reads at a time."""


def why_not(x: Tensor, codes: Tensor, scales: Tensor) -> str | None:
    return why_not_triton(x)


def forward(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    (num_rows, num_in), num_out = x.shape, len(codes)
    y = x.new_empty(num_rows, num_out)
    if num_rows > MAX_ROWS:
        return _gemm(x, codes, scales, y)
    if num_rows == 0 or num_out == 0:
        return y
    group = 0 if codes.dtype == torch.int8 else num_in // scales.shape[1]
    step = group or BLOCK_K
    blocks, steps = cdiv(num_out, BLOCK_N), cdiv(num_in, step)
    options = tile(NUM_WARPS, NUM_STAGES, BLOCK_N=BLOCK_N, BLOCK_K=step)
    resident = gpu_of(x).num_sms * WARPS_PER_SM // NUM_WARPS
    splits = max(1, min(resident // blocks, steps // MIN_STEPS))
    steps_per_split = cdiv(steps, splits)
    splits = cdiv(steps, steps_per_split)
    partial = count = None
    if splits > 1:
        partial = x.new_empty(blocks * splits * BLOCK_N * MAX_ROWS, dtype=torch.float32)
        count = counters(x, blocks)
    launch(
        quantized_linear_kernel, (blocks, splits), x, codes, scales, partial, count, y,
        x.stride(0), num_rows, num_out, num_in, steps_per_split * step,
        GROUP=group, BLOCK_M=MAX_ROWS, **options,
    )  # fmt: skip
    return y


def _gemm(x: Tensor, codes: Tensor, scales: Tensor, y: Tensor) -> Tensor:
    rows = max(1, GEMM_TILE // x.shape[1])
    for first in range(0, len(codes), rows):
        columns = slice(first, first + rows)
        mm_(y[:, columns], x, dequantize(codes[columns], scales[columns], x.dtype).t())
    return y


@triton.jit
def quantized_linear_kernel(
    x_ptr, codes_ptr, scales_ptr, partial_ptr, counters_ptr, y_ptr,
    x_stride, num_rows, num_out, num_in, inputs_per_split,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x @ (codes * scales).T for a block of outputs; GROUP is 0 for int8, or is BLOCK_K."""
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    exists, row_exists = n < num_out, m < num_rows
    first = split * inputs_per_split
    last = tl.minimum(first + inputs_per_split, num_in)
    x_ptr += m[None, :].to(tl.int64) * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GROUP == 0:
        codes_ptr += n[:, None] * num_in
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < last
            codes = tl.load(codes_ptr + k[None, :], mask=exists[:, None] & inside[None, :], other=0)
            x = tl.load(x_ptr + k[:, None], mask=row_exists[None, :] & inside[:, None], other=0)
            acc = tl.dot(codes.to(x.dtype), x, acc, input_precision="ieee")
    else:
        byte = tl.arange(0, BLOCK_K // 2)
        lower = byte // 16 * 32 + byte % 16
        codes_ptr += n[:, None] * (num_in // 2) + byte[None, :]
        scales_ptr += n * (num_in // GROUP)
        # A scale is loaded a step before its use.
        next_scale = tl.load(scales_ptr + first // GROUP, mask=exists, other=0)
        for start in range(first, last, BLOCK_K):
            scale = next_scale.to(tl.float32)
            after = (start + BLOCK_K) // GROUP
            next_scale = tl.load(
                scales_ptr + after, mask=exists & (start + BLOCK_K < last), other=0
            )
            codes = tl.load(codes_ptr + start // 2, mask=exists[:, None], other=0)
            x_lower = tl.load(x_ptr + start + lower[:, None], mask=row_exists[None, :], other=0)
            x_upper = tl.load(
                x_ptr + start + 16 + lower[:, None], mask=row_exists[None, :], other=0
            )
            low = ((codes & 15).to(tl.int8) - 8).to(x_lower.dtype)
            high = ((codes >> 4).to(tl.int8) - 8).to(x_lower.dtype)
            group = tl.dot(low, x_lower, input_precision="ieee")
            group = tl.dot(high, x_upper, group, input_precision="ieee")
            acc += group * scale[:, None]
    if partial_ptr is not None:
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        partial_ptr += block.to(tl.int64) * splits * (BLOCK_N * BLOCK_M) + place
        tl.store(partial_ptr + split * (BLOCK_N * BLOCK_M), acc)
        # The barrier puts the stores of all threads before the release of the one that counts, and
        # its acquire before the loads of all threads below.
        tl.debug_barrier()
        finished = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel", scope="gpu") + 1
        if finished < splits:
            return
        tl.debug_barrier()
        tl.atomic_xchg(counters_ptr + block, 0, sem="relaxed", scope="gpu")
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for other in range(splits):
            acc += tl.load(partial_ptr + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if GROUP == 0:
        acc *= tl.load(scales_ptr + n, mask=exists, other=0).to(tl.float32)[:, None]
    y_ptr += m[None, :].to(tl.int64) * num_out + n[:, None]
    tl.store(y_ptr, acc.to(y_ptr.dtype.element_ty), mask=exists[:, None] & row_exists[None, :])


BACKENDS = {"quantized_linear": Backend(why_not, forward)}
