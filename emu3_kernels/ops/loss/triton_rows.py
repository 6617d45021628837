"""Kernels of both losses in Triton: softmax sums and gradients of rows of logits.

T rows of V classes, of any alignment: where V is twice an odd number (Emu3 has 184,622), most rows
begin off the 16 bytes of one access. A row is split where addresses are multiples of 16 bytes: a
head of less than one vector, a body of whole vectors of VECTOR classes, a tail of less than one.
Class c is element (c + misalignment) % VECTOR of its vector, where the misalignment of a row is
the number of elements between the last multiple of 16 bytes and its start.

Which classes share an accumulator does not depend on the misalignment, nor does their order. With
the sum over accumulators in float64, results do not depend on the address of a row.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a block of -infinity must leave no NaN


@triton.jit
def _add(x, m_i, l_i):
    """Add one more class to every accumulator: one exponential for each."""
    alpha = tl.exp2(-tl.abs(x - m_i) * LOG2E)
    l_i = tl.where(x > m_i, l_i * alpha + 1, l_i + alpha)
    return tl.maximum(x, m_i), l_i


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
    The first block takes the head, the last one the tail; those between need no mask.
    """
    misalignment, first_whole, end_whole = _body(row_start, width, VECTOR)
    offset = row_start // VECTOR * VECTOR - base_misalignment
    logits_ptr = tl.multiple_of(logits_ptr + offset, 16)
    step: tl.constexpr = BLOCK // VECTOR
    vector, element = tl.arange(0, step)[:, None], tl.arange(0, VECTOR)[None, :]
    m_i = tl.full([step, VECTOR], LOWEST, tl.float32)
    l_i = tl.zeros([step, VECTOR], tl.float32)
    total = tl.zeros([step, VECTOR], tl.float32)

    c = vector * VECTOR + element
    head_end = tl.minimum(misalignment + width, first_whole * VECTOR)
    head = (element >= misalignment) & (element < head_end)
    x_head = tl.load(logits_ptr + element, mask=head, other=0).to(tl.float32)
    body = (vector >= first_whole) & (vector < end_whole)
    x = tl.load(logits_ptr + c, mask=body, other=0).to(tl.float32)
    head &= vector == 0
    x = tl.where(head, x_head, x)
    if TOTAL:
        total += x
    m_i, l_i = _add(tl.where(body | head, x, -float("inf")), m_i, l_i)

    last = end_whole // step * step
    for start in tl.range(step, last, step, num_stages=STAGES):
        x = tl.load(logits_ptr + (start * VECTOR + c)).to(tl.float32)
        if TOTAL:
            total += x
        m_i, l_i = _add(x, m_i, l_i)

    v = last + vector
    body = (v >= step) & (v < end_whole)
    x = tl.load(logits_ptr + (v * VECTOR + element), mask=body, other=0).to(tl.float32)
    at = end_whole * VECTOR + element
    tail = (at >= first_whole * VECTOR) & (at < misalignment + width)
    x_tail = tl.load(logits_ptr + at, mask=tail, other=0).to(tl.float32)
    tail &= v == end_whole
    x = tl.where(tail, x_tail, x)
    if TOTAL:
        total += x
    m_i, l_i = _add(tl.where(body | tail, x, -float("inf")), m_i, l_i)

    m_row = tl.max(m_i)
    l_i *= tl.exp2((m_i - m_row) * LOG2E)
    return m_row, tl.sum(l_i.to(tl.float64)), tl.sum(total.to(tl.float64))


@triton.jit
def _weight_of(row, targets_ptr, weights_ptr, ignore_index, inside, WEIGHTED: tl.constexpr):
    """Return the target and the weight of tokens ``inside``, 0 for an ignored one."""
    target = tl.load(targets_ptr + row, mask=inside, other=ignore_index)
    weight = (target != ignore_index).to(tl.float32)
    if WEIGHTED:
        given = tl.load(weights_ptr + row, mask=inside, other=0).to(tl.float32)
        weight = tl.where(target != ignore_index, given, 0)
    return target, weight


@triton.jit
def _number(number_ptr, number):
    """Return the number that a tensor holds, if there is one, else ``number``."""
    if number_ptr is not None:
        number = tl.load(number_ptr)
    return tl.zeros([], tl.float64) + number


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, normalizer_ptr, losses_ptr, saved_ptr,
    base_misalignment, stride, num_classes, ignore_index, normalizer, z_loss, label_smoothing,
    WEIGHTED: tl.constexpr, NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = w * (lse - (1 - s) * logits[target] - s * mean(logits) + z * lse**2) / normalizer.

    A program a row. The normalizer is that of single losses, 1 unless NORMALIZED. Saved are the
    divisor, whether all targets are fine, and m and log2(l) of every row.
    """
    row = tl.program_id(0).to(tl.int64)
    target, weight = _weight_of(row, targets_ptr, weights_ptr, ignore_index, row >= 0, WEIGHTED)
    valid = weight != 0
    width = tl.where(valid, num_classes, 0)
    m_i, l_i, total = softmax_of_row(
        logits_ptr, base_misalignment, base_misalignment + row * stride, width,
        SMOOTHED, VECTOR, BLOCK, STAGES,
    )  # fmt: skip
    # A target that is no class is refused, but not before this launch.
    exists = valid & (target >= 0) & (target < num_classes)
    logit = tl.load(logits_ptr + row * stride + target, mask=exists, other=0).to(tl.float32)
    lse = m_i + tl.log(l_i)
    loss = lse - (1 - label_smoothing) * logit.to(tl.float64) + z_loss * lse * lse
    if SMOOTHED:
        loss -= label_smoothing * total / num_classes
    loss = loss.to(tl.float32) * weight
    if NORMALIZED:
        loss = loss.to(tl.float64) / _number(normalizer_ptr, normalizer)
    log2_l = tl.log2(l_i)
    tl.store(losses_ptr + row, tl.where(valid, loss, 0))
    tl.store(saved_ptr + 2 + 2 * row, tl.where(valid, m_i, 0))
    tl.store(saved_ptr + 3 + 2 * row, tl.where(valid, log2_l, 0))


@triton.jit
def cross_entropy_reduce_kernel(
    losses_ptr, targets_ptr, weights_ptr, normalizer_ptr, total_ptr, saved_ptr,
    num_rows, num_classes, ignore_index, normalizer,
    WEIGHTED: tl.constexpr, NORMALIZED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the sum of all losses over its divisor, the divisor, and whether all targets are fine.

    One program, so that the order of the sums is always the same. The divisor is the normalizer
    if there is one, the sum of the weights of a MEAN, else 1; and 1 without a valid token.
    """
    loss, weights = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    valid, wrong = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        target, weight = _weight_of(row, targets_ptr, weights_ptr, ignore_index, inside, WEIGHTED)
        loss += tl.load(losses_ptr + row, mask=inside, other=0).to(tl.float64)
        weights += weight.to(tl.float64)
        valid |= (weight != 0).to(tl.int32)
        is_class = (target >= 0) & (target < num_classes)
        wrong |= (inside & (target != ignore_index) & (is_class == 0)).to(tl.int32)
    divisor = tl.full([], 1, tl.float64)
    if NORMALIZED:
        divisor = _number(normalizer_ptr, normalizer)
    elif MEAN:
        divisor = tl.sum(weights)
    divisor = tl.where(tl.max(valid) != 0, divisor, 1).to(tl.float32)
    # As a division of float32 rounds, which Triton's does not.
    total = tl.sum(loss).to(tl.float32).to(tl.float64) / divisor.to(tl.float64)
    tl.store(total_ptr, total)
    tl.store(saved_ptr, divisor)
    tl.store(saved_ptr + 1, 1 - tl.max(wrong))


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
def _gradient_of_row(
    row, valid, dloss, target, logits_ptr, dlogits_ptr, softmax_ptr,
    base_misalignment, stride, dstride, width, num_classes, z_loss, label_smoothing,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss * (softmax * (1 + 2 z lse) - (1 - s) * onehot - s / V): a block of a row.

    A row that is not valid is not read, and its gradient is 0. The first program of a row also
    computes its head and tail.
    """
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
    at_target = target + misalignment
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


@triton.jit
def cross_entropy_bwd_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, weights_ptr, saved_ptr, dout_ptr,
    base_misalignment, stride, dstride, dout_stride, num_classes, ignore_index,
    z_loss, label_smoothing,
    WEIGHTED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss = dout * weight / divisor, of one number or of one for each row."""
    row = tl.program_id(0).to(tl.int64)
    target, weight = _weight_of(row, targets_ptr, weights_ptr, ignore_index, row >= 0, WEIGHTED)
    valid = weight != 0
    dout = tl.load(dout_ptr + row * dout_stride, mask=valid, other=0).to(tl.float32)
    dloss = dout / tl.load(saved_ptr) * weight
    _gradient_of_row(
        row, valid, dloss, target, logits_ptr, dlogits_ptr, saved_ptr + 2,
        base_misalignment, stride, dstride, num_classes, num_classes, z_loss, label_smoothing,
        VECTOR, BLOCK,
    )  # fmt: skip


@triton.jit
def linear_cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, softmax_ptr, dlosses_ptr,
    base_misalignment, stride, width, first, num_classes, z_loss, label_smoothing,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite a chunk of logits, the classes from ``first`` on, with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    dloss = tl.load(dlosses_ptr + row)
    _gradient_of_row(
        row, dloss != 0, dloss, tl.load(targets_ptr + row) - first,
        logits_ptr, logits_ptr, softmax_ptr,
        base_misalignment, stride, stride, width, num_classes, z_loss, label_smoothing,
        VECTOR, BLOCK,
    )  # fmt: skip
