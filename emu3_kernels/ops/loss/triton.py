"""Both losses in Triton: softmax sums and gradients of rows of logits. The GEMMs are torch's.

T rows of V classes, of any alignment: where V is twice an odd number (Emu3 has 184,622), most rows
begin off the 16 bytes of one access. A row is split where addresses are multiples of 16 bytes: a
head of less than one vector, a body of whole vectors of VECTOR classes, a tail of less than one.
Class c is element (c + misalignment) % VECTOR of its vector, where the misalignment of a row is
the number of elements between the last multiple of 16 bytes and its start.

Which classes share an accumulator does not depend on the misalignment, nor does their order. With
the sum over accumulators in float64, results do not depend on the address of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.loss.chunks import Kernels, as_ops
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, tile, why_not_triton

# 16 elements a thread with warps of 32 threads, 8 (the 16 bytes of one access) with 64. Stages are
# blocks of a row in flight, since few rows have to keep a multiprocessor busy.
SUMS_TILE = tile(num_warps=8, num_stages=4, BLOCK=4096, STAGES=4)
GRADIENT_TILE = tile(num_warps=4, BLOCK=2048)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a block of -infinity must leave no NaN


def why_not(x: Tensor, *_: object) -> str | None:
    return why_not_triton(x)


def vector_width(logits: Tensor) -> int:
    """Return the elements of one access of 16 bytes."""
    return 16 // logits.element_size()


def misalignment_of(logits: Tensor) -> int:
    """Count the elements from the last multiple of 16 bytes to the first logit."""
    if torch.compiler.is_compiling():  # an address is not known then, but storages are aligned
        return logits.storage_offset() % vector_width(logits)
    return logits.data_ptr() // logits.element_size() % vector_width(logits)


def forward(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[T]``, and m and log2(l) of the softmax ``[T, 2]``; 0 at weight 0."""
    num_rows, num_classes = logits.shape
    losses, softmax = weights.new_empty(num_rows), weights.new_empty(num_rows, 2)
    if num_rows:
        launch(
            cross_entropy_fwd_kernel, (num_rows,),
            logits, targets, weights, losses, softmax,
            misalignment_of(logits), logits.stride(0), num_classes, z_loss, label_smoothing,
            SMOOTHED=label_smoothing != 0, VECTOR=vector_width(logits), **SUMS_TILE,
        )  # fmt: skip
    return losses, softmax


def backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    softmax: Tensor,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    dlogits = _empty_aligned_like(logits)
    settings = (logits.shape[1], z_loss, label_smoothing)
    if logits.numel():
        write_gradient(logits, dlogits, targets, softmax, dlosses.contiguous(), 0, *settings)
    return dlogits


def _empty_aligned_like(logits: Tensor) -> Tensor:
    """Make a tensor like ``logits`` whose rows have the same misalignment."""
    num_rows, num_classes = logits.shape
    misalignment, stride = misalignment_of(logits), logits.stride(0)
    stride = num_classes + (stride - num_classes) % vector_width(logits)
    memory = logits.new_empty(misalignment + num_rows * stride)
    return memory[misalignment:].view(num_rows, stride)[:, :num_classes]


def write_gradient(
    logits: Tensor,
    dlogits: Tensor,
    targets: Tensor,
    softmax: Tensor,
    dlosses: Tensor,
    first: int,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Write into ``dlogits`` the gradient of logits whose classes begin at ``first``.

    ``dlogits`` is ``logits`` itself or has rows of the same misalignment.
    """
    num_rows, width = logits.shape
    grid = (num_rows, cdiv(width + vector_width(logits), GRADIENT_TILE["BLOCK"]))
    launch(
        cross_entropy_bwd_kernel, grid,
        logits, dlogits, targets, softmax, dlosses,
        misalignment_of(logits), logits.stride(0), dlogits.stride(0), width, first, num_classes,
        z_loss, label_smoothing, VECTOR=vector_width(logits), **GRADIENT_TILE,
    )  # fmt: skip


def add_(
    logits: Tensor, targets: Tensor, state: Tensor, first: int, label_smoothing: float
) -> None:
    num_rows, width = logits.shape
    if logits.numel():
        launch(
            linear_cross_entropy_add_kernel, (num_rows,),
            logits, targets, state, misalignment_of(logits), logits.stride(0), width, first,
            SMOOTHED=label_smoothing != 0, VECTOR=vector_width(logits), **SUMS_TILE,
        )  # fmt: skip


def gradient_(logits: Tensor, *chunk: Tensor | float) -> None:
    if logits.numel():
        write_gradient(logits, logits, *chunk)


losses, gradients = as_ops("triton", Kernels(add_, gradient_))
BACKENDS = {
    "cross_entropy": Backend(why_not, forward, backward),
    "linear_cross_entropy": Backend(why_not, losses, gradients),
}


@triton.jit
def _add(x, inside, m_i, l_i, total, TOTAL: tl.constexpr):
    """Add one more class to every accumulator ``inside``: one exponential for each."""
    if TOTAL:
        total += tl.where(inside, x, 0)
    x = tl.where(inside, x, -float("inf"))
    alpha = tl.exp2(-tl.abs(x - m_i) * LOG2E)
    l_i = tl.where(x > m_i, l_i * alpha + 1, l_i + alpha)
    return tl.maximum(x, m_i), l_i, total


@triton.jit
def _body(row_start, width, VECTOR: tl.constexpr):
    """Return the misalignment of a row, its first whole vector and the one after its last."""
    misalignment = (row_start % VECTOR).to(tl.int32)
    first_whole = (misalignment + VECTOR - 1) // VECTOR
    return misalignment, first_whole, (misalignment + width) // VECTOR


@triton.jit
def softmax_of_row(
    logits_ptr, base_misalignment, row_start, width,
    TOTAL: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return m, the largest logit, l, the sum of exp(logit - m), and (if TOTAL) the sum.

    ``row_start`` counts from the multiple of 16 bytes ``base_misalignment`` before ``logits_ptr``.
    """
    misalignment, first_whole, end_whole = _body(row_start, width, VECTOR)
    offset = row_start // VECTOR * VECTOR - base_misalignment
    logits_ptr = tl.multiple_of(logits_ptr + offset, 16)
    vector, element = tl.arange(0, BLOCK // VECTOR)[:, None], tl.arange(0, VECTOR)[None, :]
    m_i = tl.full([BLOCK // VECTOR, VECTOR], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK // VECTOR, VECTOR], tl.float32)
    total = tl.zeros([BLOCK // VECTOR, VECTOR], tl.float32)

    head_end = tl.minimum(misalignment + width, first_whole * VECTOR)
    head = (element >= misalignment) & (element < head_end)
    x_head = tl.load(logits_ptr + element, mask=head, other=0).to(tl.float32)
    head = head & (vector == 0)
    m_i, l_i, total = _add(x_head, head, m_i, l_i, total, TOTAL)
    for start in tl.range(0, end_whole, BLOCK // VECTOR, num_stages=STAGES):
        v = start + vector
        body = (v >= first_whole) & (v < end_whole)
        x = tl.load(logits_ptr + (v * VECTOR + element), mask=body, other=0).to(tl.float32)
        m_i, l_i, total = _add(x, body, m_i, l_i, total, TOTAL)
    c = end_whole * VECTOR + element
    tail = (c >= first_whole * VECTOR) & (c < misalignment + width)
    x_tail = tl.load(logits_ptr + c, mask=tail, other=0).to(tl.float32)
    tail = tail & (vector == end_whole % (BLOCK // VECTOR))
    m_i, l_i, total = _add(x_tail, tail, m_i, l_i, total, TOTAL)

    m_row = tl.max(m_i)
    l_i *= tl.exp2((m_i - m_row) * LOG2E)
    return m_row, tl.sum(l_i.to(tl.float64)), tl.sum(total.to(tl.float64))


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, losses_ptr, softmax_ptr,
    base_misalignment, stride, num_classes, z_loss, label_smoothing,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = lse - (1 - s) * logits[target] - s * mean(logits) + z * lse**2: a program a row."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(weights_ptr + row) != 0
    width = tl.where(valid, num_classes, 0)
    m_i, l_i, total = softmax_of_row(
        logits_ptr, base_misalignment, base_misalignment + row * stride, width,
        SMOOTHED, VECTOR, BLOCK, STAGES,
    )  # fmt: skip
    target = tl.load(targets_ptr + row)
    target = tl.load(logits_ptr + row * stride + target, mask=valid, other=0).to(tl.float32)
    lse = m_i + tl.log(l_i)
    loss = lse - (1 - label_smoothing) * target.to(tl.float64) + z_loss * lse * lse
    if SMOOTHED:
        loss -= label_smoothing * total / num_classes
    log2_l = tl.log2(l_i)
    tl.store(losses_ptr + row, tl.where(valid, loss, 0))
    tl.store(softmax_ptr + 2 * row, tl.where(valid, m_i, 0))
    tl.store(softmax_ptr + 2 * row + 1, tl.where(valid, log2_l, 0))


@triton.jit
def linear_cross_entropy_add_kernel(
    logits_ptr, targets_ptr, state_ptr, base_misalignment, stride, width, first,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a chunk of classes to the softmax state of each row; the first chunk begins it."""
    row = tl.program_id(0).to(tl.int64)
    m_i, l_i, total = softmax_of_row(
        logits_ptr, base_misalignment, base_misalignment + row * stride, width,
        SMOOTHED, VECTOR, BLOCK, STAGES,
    )  # fmt: skip
    target = tl.load(targets_ptr + row) - first
    here = (target >= 0) & (target < width)
    logit = tl.load(logits_ptr + row * stride + target, mask=here, other=0)

    state_ptr += 4 * row
    later = first > 0
    m_before = tl.load(state_ptr, mask=later, other=LOWEST).to(tl.float32)
    m_new = tl.maximum(m_before, m_i)
    l_before = tl.load(state_ptr + 1, mask=later, other=0)
    l_i *= tl.exp2((m_i - m_new) * LOG2E)
    l_i += l_before * tl.exp2((m_before - m_new) * LOG2E)
    total += tl.load(state_ptr + 2, mask=later, other=0)
    logit = logit.to(tl.float64) + tl.load(state_ptr + 3, mask=later, other=0)
    tl.store(state_ptr, m_new.to(tl.float64))
    tl.store(state_ptr + 1, l_i)
    tl.store(state_ptr + 2, total)
    tl.store(state_ptr + 3, logit)


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, i, read, inside, m_i, log2_l, scale, spread, onehot, at_target
):
    x = tl.load(logits_ptr + i, mask=read, other=0).to(tl.float32)
    dx = tl.exp2((x - m_i) * LOG2E - log2_l) * scale + spread
    dx = tl.where(i == at_target, dx - onehot, dx)
    tl.store(dlogits_ptr + i, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_bwd_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, softmax_ptr, dlosses_ptr,
    base_misalignment, stride, dstride, width, first, num_classes, z_loss, label_smoothing,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss * (softmax * (1 + 2 z lse) - (1 - s) * onehot - s / V).

    A row whose dloss is 0 is not read, and its gradient is 0. The first program of a row also
    computes its head and tail.
    """
    row = tl.program_id(0).to(tl.int64)
    dloss = tl.load(dlosses_ptr + row)
    valid = dloss != 0
    m_i = tl.load(softmax_ptr + 2 * row, mask=valid, other=0)
    log2_l = tl.load(softmax_ptr + 2 * row + 1, mask=valid, other=0)
    scale = dloss * (1 + 2 * z_loss * (m_i + LN2 * log2_l))
    spread = -dloss * label_smoothing / num_classes
    onehot = dloss * (1 - label_smoothing)

    row_start, drow_start = base_misalignment + row * stride, base_misalignment + row * dstride
    misalignment, first_whole, end_whole = _body(row_start, width, VECTOR)
    offset = row_start // VECTOR * VECTOR - base_misalignment
    doffset = drow_start // VECTOR * VECTOR - base_misalignment
    logits_ptr = tl.multiple_of(logits_ptr + offset, 16)
    dlogits_ptr = tl.multiple_of(dlogits_ptr + doffset, 16)
    at_target = tl.load(targets_ptr + row) - first + misalignment
    v = tl.program_id(1) * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)[:, None]
    body = (v >= first_whole) & (v < end_whole)
    read = (v >= first_whole) & (v < tl.where(valid, end_whole, 0))
    _store_gradient(
        logits_ptr, dlogits_ptr, v * VECTOR + tl.arange(0, VECTOR)[None, :], read, body,
        m_i, log2_l, scale, spread, onehot, at_target,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        ends = tl.arange(0, 2 * VECTOR)
        i = tl.where(ends < VECTOR, ends, ends + (end_whole - 1) * VECTOR)
        inside = (i >= misalignment) & (i < misalignment + width)
        inside &= (ends < VECTOR) == (i < first_whole * VECTOR)
        read_ends = inside & (i < tl.where(valid, misalignment + width, 0))
        _store_gradient(
            logits_ptr, dlogits_ptr, i, read_ends, inside,
            m_i, log2_l, scale, spread, onehot, at_target,
        )  # fmt: skip
