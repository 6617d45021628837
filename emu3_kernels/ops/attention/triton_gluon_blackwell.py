"""Attention in Gluon for sm_100, forward: warps that copy, issue matmuls and compute softmaxes.

A program computes two blocks of 128 queries of one head. One warp copies keys and values, as on
sm_90. Another issues every matmul: its result is in tensor memory, of which a program has 128 rows
of 512 columns of 32 bits. Each of two groups of four warps turns the scores of a block of queries
into probabilities, a row a thread, and rescales what it has summed; meanwhile the tensor cores
compute the matmuls of the other group.

Probabilities replace their scores in tensor memory: with head_dim 128, scores and sums take all
columns. The next scores, which are written there too, are issued after the matmul that reads the
probabilities. Matmuls of a program run in that order, on which CUTLASS's kernel depends as well;
PTX promises it of one accumulator.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    mbarrier,
    tcgen05_mma,
)

from emu3_kernels.ops.attention.triton_gluon_kernel import (
    LOG2E,
    LOWEST,
    copy,
    keys_of_block,
    keys_of_rows,
    log_of_sum,
    masked,
    program_ids,
)

PART = gl.constexpr(64)  # columns of tensor memory that a thread has in registers at a time
# Of a thread: of the 65,536 of an SM, what 4 warps (2 idle) leave to 8 that compute softmaxes.
ISSUE_REGISTERS = gl.constexpr(24)
COMPUTE_REGISTERS = gl.constexpr(240)


@gluon.jit
def attention_fwd_gluon_blackwell_kernel(
    out_ptr, lse_ptr, q_desc, k_desc, v_desc, first_ptr, end_ptr, range_stride, offset, scale,
    q_head_stride, k_head_stride, v_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out = sum(p * v) / sum(p);  p = exp(scale * (q @ k - m))."""
    num_blocks = (num_queries + 2 * BLOCK_M - 1) // (2 * BLOCK_M)
    batch, kv_head, head, block = program_ids(num_blocks, num_heads, num_kv_heads)
    if first_ptr is not None:
        first_ptr += batch.to(gl.int64) * range_stride
        end_ptr += batch.to(gl.int64) * range_stride
    first_row = batch.to(gl.int64) * num_queries * num_heads
    out_ptr += (first_row + head) * HEAD_DIM
    lse_ptr += first_row + head * num_queries
    low = block * 2 * BLOCK_M
    first_key, whole_key, ragged_key, end_key = keys_of_block(
        first_ptr, end_ptr, offset, low, num_queries, num_keys, 2 * BLOCK_M, BLOCK_N
    )

    dtype: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_DIM], q_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], v_desc.layout)
    SCORES: gl.constexpr = TensorMemoryLayout((BLOCK_M, BLOCK_N), col_stride=1)  # noqa: N806
    ACC: gl.constexpr = TensorMemoryLayout((BLOCK_M, HEAD_DIM), col_stride=1)  # noqa: N806
    scores = allocate_tensor_memory(gl.float32, [2, BLOCK_M, BLOCK_N], SCORES)
    acc = allocate_tensor_memory(gl.float32, [2, BLOCK_M, HEAD_DIM], ACC)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scores_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=4)
    for group in gl.static_range(2):
        mbarrier.init(scores_full.index(group), count=1)
        mbarrier.init(p_full.index(group), count=1)
    q_row, kv_row = batch * num_queries + low, batch * num_keys
    q_column, k_column = head * q_head_stride, kv_head * k_head_stride
    v_column, out_stride = kv_head * v_head_stride, num_heads * HEAD_DIM
    gl.warp_specialize(
        [
            (attend, (
                scores, acc, scores_full, p_full,
                out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys,
                out_stride, first_key, whole_key, ragged_key, end_key,
                0, dtype, HEAD_DIM, BLOCK_M, BLOCK_N,
            )),
            (attend, (
                scores, acc, scores_full, p_full,
                out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys,
                out_stride, first_key, whole_key, ragged_key, end_key,
                1, dtype, HEAD_DIM, BLOCK_M, BLOCK_N,
            )),
            (issue, (
                q_tile, k_tile, v_tile, scores, acc, q_full, k_full, v_full, v_free,
                scores_full, p_full, first_key, end_key, BLOCK_M, BLOCK_N, STAGES,
            )),
            (copy, (
                q_desc, k_desc, v_desc, q_tile, k_tile, v_tile,
                q_full, k_full, v_full, v_free,
                q_row, q_column, kv_row, k_column, v_column, first_key, end_key,
                BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1, 1],
        [COMPUTE_REGISTERS, ISSUE_REGISTERS, ISSUE_REGISTERS],
    )  # fmt: skip


@gluon.jit
def issue(
    q_tile, k_tile, v_tile, scores, acc, q_full, k_full, v_full, v_free, scores_full, p_full,
    first_key, end_key, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Issue the matmuls of both groups: after the values of a block, the scores of the next.

    All four free the values, so that the keys of the next block were read too, as ``copy`` needs.
    """
    dtype: gl.constexpr = q_tile.dtype
    mbarrier.wait(q_full, 0)
    if first_key < end_key:
        mbarrier.wait(k_full.index(0), 0)
        keys = k_tile.index(0).permute((1, 0))
        for group in gl.static_range(2):
            full, tile = scores_full.index(group), scores.index(group)
            tcgen05_mma(q_tile.index(group), keys, tile, use_acc=False, mbarriers=[full])
        last = (end_key - first_key - 1) // BLOCK_N
        for nth in range(last):
            stage, phase = nth % STAGES, nth // STAGES & 1
            after, phase_after = (nth + 1) % STAGES, (nth + 1) // STAGES & 1
            mbarrier.wait(v_full.index(stage), phase)
            free, values = v_free.index(stage), v_tile.index(stage)
            keys = k_tile.index(after).permute((1, 0))
            for group in gl.static_range(2):
                # The group has read the scores, and rescaled what is summed.
                mbarrier.wait(p_full.index(group), nth & 1)
                p = p_of(scores.index(group), dtype, BLOCK_M, BLOCK_N)
                tcgen05_mma(p, values, acc.index(group), mbarriers=[free])
                mbarrier.wait(k_full.index(after), phase_after)
                full, tile = scores_full.index(group), scores.index(group)
                tcgen05_mma(q_tile.index(group), keys, tile, use_acc=False, mbarriers=[full, free])
        mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
        for group in gl.static_range(2):
            mbarrier.wait(p_full.index(group), last & 1)
            p = p_of(scores.index(group), dtype, BLOCK_M, BLOCK_N)
            full, values = scores_full.index(group), v_tile.index(last % STAGES)
            tcgen05_mma(p, values, acc.index(group), mbarriers=[full])


@gluon.jit
def p_of(scores, dtype: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the columns of scores as those of 16-bit probabilities, two in one."""
    P: gl.constexpr = TensorMemoryLayout((BLOCK_M, BLOCK_N), col_stride=1)  # noqa: N806
    return scores._reinterpret(dtype, [BLOCK_M, 2 * BLOCK_N], P).slice(0, BLOCK_N)


@gluon.jit
def attend(
    scores, acc, scores_full, p_full,
    out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys, out_stride,
    first_key, whole_key, ragged_key, end_key,
    GROUP: gl.constexpr, dtype: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Compute the softmax of a block of queries, and store the result: a row a thread."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, PART], [32, 1], [4, 1], [0, 1])  # noqa: N806
    scores, acc = scores.index(GROUP), acc.index(GROUP)
    scores_full, p_full = scores_full.index(GROUP), p_full.index(GROUP)
    low += GROUP * BLOCK_M
    i = low + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
    first, length = keys_of_rows(
        first_ptr, end_ptr, i, offset, num_queries, num_keys, gl.SliceLayout(1, ROWS), BLOCK_M
    )
    for part in gl.static_range(0, HEAD_DIM, PART):
        acc.slice(part, PART).store(gl.zeros([BLOCK_M, PART], gl.float32, ROWS))
    l_i = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, ROWS))
    m_i = gl.full([BLOCK_M], LOWEST, gl.float32, gl.SliceLayout(1, ROWS))
    log2_scale, nth = scale * LOG2E, 0
    if first_ptr is not None:
        l_i, m_i, nth = attend_blocks(
            scores, acc, scores_full, p_full, l_i, m_i, nth, first_key, whole_key,
            first, length, log2_scale, True, ROWS, dtype, HEAD_DIM, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    l_i, m_i, nth = attend_blocks(
        scores, acc, scores_full, p_full, l_i, m_i, nth, whole_key, ragged_key,
        first, length, log2_scale, False, ROWS, dtype, HEAD_DIM, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    l_i, m_i, nth = attend_blocks(
        scores, acc, scores_full, p_full, l_i, m_i, nth, ragged_key, end_key,
        first, length, log2_scale, True, ROWS, dtype, HEAD_DIM, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if nth > 0:
        mbarrier.wait(scores_full, nth & 1)

    lse, l_i = log_of_sum(l_i, m_i, log2_scale)
    gl.store(lse_ptr + i, lse, mask=i < num_queries)
    for part in gl.static_range(0, HEAD_DIM, PART):
        c = part + gl.arange(0, PART, layout=gl.SliceLayout(0, ROWS))
        out = acc.slice(part, PART).load(ROWS) * (1 / l_i)[:, None]
        out_ptrs = out_ptr + i.to(gl.int64)[:, None] * out_stride + c[None, :]
        gl.store(out_ptrs, out.to(dtype), mask=(i < num_queries)[:, None])


@gluon.jit
def attend_blocks(
    scores, acc, scores_full, p_full, l_i, m_i, nth, start_key, end_key, first, length, log2_scale,
    MASKED: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Turn the scores of blocks of keys from block ``nth`` on into probabilities."""
    probabilities = p_of(scores, dtype, BLOCK_M, BLOCK_N)
    for start in range(start_key, end_key, BLOCK_N):
        # A barrier completes after all matmuls that were issued before: the sums are complete too.
        mbarrier.wait(scores_full, nth & 1)
        left, right = scores.slice(0, PART).load(ROWS), scores.slice(PART, PART).load(ROWS)
        if MASKED:
            left = masked(left, start, first, length, ROWS, PART)
            right = masked(right, start + PART, first, length, ROWS, PART)
        m_new = gl.maximum(m_i, gl.max(gl.maximum(left, right), 1))
        alpha, m_i = gl.exp2((m_i - m_new) * log2_scale), m_new
        p = gl.exp2(left * log2_scale - (m_new * log2_scale)[:, None])
        probabilities.slice(0, PART).store(p.to(dtype))
        l_i = l_i * alpha + gl.sum(p, 1)
        p = gl.exp2(right * log2_scale - (m_new * log2_scale)[:, None])
        probabilities.slice(PART, PART).store(p.to(dtype))
        l_i += gl.sum(p, 1)
        if nth > 0:
            for part in gl.static_range(0, HEAD_DIM, PART):
                sums = acc.slice(part, PART)
                sums.store(sums.load(ROWS) * alpha[:, None])
        mbarrier.arrive(p_full, count=1)
        nth += 1
    return l_i, m_i, nth
