"""Softmax sums and gradients of rows of logits in Triton: what the two token losses share.

T rows of V classes that start anywhere: twice an odd number of classes (Emu3 has 184,622) starts
most rows off the 16 bytes of one access. So a row is cut where the addresses are multiples of 16
bytes, into groups of LANES classes; the first and the last may be parts of one, and are read alone.
Class c lies in lane (c + lead) % LANES, lead being the lanes before the row.

Which classes share an accumulator does not depend on the lead, nor does their order: with the sum
over the accumulators in float64, where a row lies in memory leaves the results as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import Contract, Tile

# 16 elements a thread with warps of 32 lanes, 8 (the 16 bytes of one access) with 64. Stages are
# the blocks of a row under way: few rows have to keep a multiprocessor busy.
SUMS_TILE = Tile(block=4096, num_warps=8, num_stages=4)
GRADIENT_TILE = Tile(block=2048, num_warps=4)

# Two programs of 96 registers a multiprocessor, 24 KiB of each under way. Narrow are the parts of a
# group at both ends of a row (a thread has all lanes), its weight, target and target logit; stored
# are a loss and two numbers. What the other losses add to that is theirs to say.
SUMS = Contract(
    max_registers=96,
    scalar_loads=2 * 8 + 3,
    scalar_stores=3,
    async_copies=True,
    exceptions={"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"},
)
# All the threads that a multiprocessor holds. Narrow are dloss, target, two numbers of the softmax
# and, in the first program of a row, the parts of a group.
GRADIENT = Contract(max_registers=32, scalar_loads=5, scalar_stores=1)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a block of -infinity must leave no NaN


def lanes(logits: Tensor) -> int:
    return 16 // logits.element_size()


def lead_of(logits: Tensor) -> int:
    """Count the elements from the last multiple of 16 bytes to the first logit."""
    if torch.compiler.is_compiling():  # an address is not known then, but storages are aligned
        return logits.storage_offset() % lanes(logits)
    return logits.data_ptr() // logits.element_size() % lanes(logits)


def write_gradient(
    logits: Tensor,
    dlogits: Tensor,
    targets: Tensor,
    denominators: Tensor,
    dlosses: Tensor,
    first: int,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Write into ``dlogits`` the gradient of logits whose classes begin at ``first``.

    ``dlogits`` is ``logits`` itself or lies within 16 bytes as they do, row by row.
    """
    num_rows, width = logits.shape
    grid = (num_rows, triton.cdiv(width + lanes(logits), GRADIENT_TILE.block))
    _gradient_kernel[grid](
        logits, dlogits, targets, denominators, dlosses,
        lead_of(logits), logits.stride(0), dlogits.stride(0), width, first, num_classes,
        z_loss, label_smoothing, LANES=lanes(logits), **GRADIENT_TILE.options(),
    )  # fmt: skip


@triton.jit
def _add(x, inside, highest, total_exp, total, TOTAL: tl.constexpr):
    """Add one more class to every accumulator ``inside``: one exponential for each."""
    if TOTAL:
        total += tl.where(inside, x, 0)
    x = tl.where(inside, x, -float("inf"))
    scale = tl.exp2(-tl.abs(x - highest) * LOG2E)
    total_exp = tl.where(x > highest, total_exp * scale + 1, total_exp + scale)
    return tl.maximum(x, highest), total_exp, total


@triton.jit
def _cut(row_start, width, LANES: tl.constexpr):
    """Return the lead of a row and, of its whole groups, the first and the one after the last."""
    lead = (row_start % LANES).to(tl.int32)
    return lead, (lead + LANES - 1) // LANES, (lead + width) // LANES


@triton.jit
def sums_of_row(
    logits_ptr, base_lead, row_start, width,
    TOTAL: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the largest logit, the sum of exponentials over its own, and (if TOTAL) the sum.

    ``row_start`` counts from the multiple of 16 bytes that is ``base_lead`` before ``logits_ptr``.
    """
    lead, first_whole, end_whole = _cut(row_start, width, LANES)
    logits_ptr = tl.multiple_of(logits_ptr + (row_start // LANES * LANES - base_lead), 16)
    group, lane = tl.arange(0, BLOCK // LANES)[:, None], tl.arange(0, LANES)[None, :]
    highest = tl.full([BLOCK // LANES, LANES], LOWEST, tl.float32)
    total_exp = tl.zeros([BLOCK // LANES, LANES], tl.float32)
    total = tl.zeros([BLOCK // LANES, LANES], tl.float32)

    head = (lane >= lead) & (lane < tl.minimum(lead + width, first_whole * LANES))
    first = tl.load(logits_ptr + lane, mask=head, other=0).to(tl.float32)
    head = head & (group == 0)
    highest, total_exp, total = _add(first, head, highest, total_exp, total, TOTAL)
    for start in tl.range(0, end_whole, BLOCK // LANES, num_stages=STAGES):
        g = start + group
        whole = (g >= first_whole) & (g < end_whole)
        x = tl.load(logits_ptr + (g * LANES + lane), mask=whole, other=0).to(tl.float32)
        highest, total_exp, total = _add(x, whole, highest, total_exp, total, TOTAL)
    c = end_whole * LANES + lane
    tail = (c >= first_whole * LANES) & (c < lead + width)
    last = tl.load(logits_ptr + c, mask=tail, other=0).to(tl.float32)
    tail = tail & (group == end_whole % (BLOCK // LANES))
    highest, total_exp, total = _add(last, tail, highest, total_exp, total, TOTAL)

    top = tl.max(highest)
    total_exp *= tl.exp2((highest - top) * LOG2E)
    return top, tl.sum(total_exp.to(tl.float64)), tl.sum(total.to(tl.float64))


@triton.jit
def _write_gradient(
    logits_ptr, dlogits_ptr, i, read, inside, highest, log2_sum, scale, spread, onehot, at_target
):
    x = tl.load(logits_ptr + i, mask=read, other=0).to(tl.float32)
    dx = tl.exp2((x - highest) * LOG2E - log2_sum) * scale + spread
    dx = tl.where(i == at_target, dx - onehot, dx)
    tl.store(dlogits_ptr + i, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, denominators_ptr, dlosses_ptr,
    base_lead, stride, dstride, width, first, num_classes, z_loss, label_smoothing,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss * (softmax * (1 + 2 z lse) - (1 - s) * onehot - s / V).

    A row whose dloss is 0 is not read, and gets 0. The first block of a row also takes its parts
    of a group.
    """
    row = tl.program_id(0).to(tl.int64)
    dloss = tl.load(dlosses_ptr + row)
    kept = dloss != 0
    highest = tl.load(denominators_ptr + 2 * row, mask=kept, other=0)
    log2_sum = tl.load(denominators_ptr + 2 * row + 1, mask=kept, other=0)
    scale = dloss * (1 + 2 * z_loss * (highest + LN2 * log2_sum))
    spread = -dloss * label_smoothing / num_classes
    onehot = dloss * (1 - label_smoothing)

    row_start, drow_start = base_lead + row * stride, base_lead + row * dstride
    lead, first_whole, end_whole = _cut(row_start, width, LANES)
    logits_ptr = tl.multiple_of(logits_ptr + (row_start // LANES * LANES - base_lead), 16)
    dlogits_ptr = tl.multiple_of(dlogits_ptr + (drow_start // LANES * LANES - base_lead), 16)
    at_target = tl.load(targets_ptr + row) - first + lead
    g = tl.program_id(1) * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)[:, None]
    whole = (g >= first_whole) & (g < end_whole)
    read = (g >= first_whole) & (g < tl.where(kept, end_whole, 0))
    _write_gradient(
        logits_ptr, dlogits_ptr, g * LANES + tl.arange(0, LANES)[None, :], read, whole,
        highest, log2_sum, scale, spread, onehot, at_target,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        part = tl.arange(0, 2 * LANES)
        i = tl.where(part < LANES, part, part + (end_whole - 1) * LANES)
        inside = (i >= lead) & (i < lead + width)
        inside &= (part < LANES) == (i < first_whole * LANES)
        _write_gradient(
            logits_ptr, dlogits_ptr, i, inside & (i < tl.where(kept, lead + width, 0)), inside,
            highest, log2_sum, scale, spread, onehot, at_target,
        )  # fmt: skip
