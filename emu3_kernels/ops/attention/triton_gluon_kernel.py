"""Attention in Gluon for sm_90, forward: warps that copy and warps that compute.

A program computes two blocks of queries of one head. One warp copies keys and values to shared
memory by tensor descriptors, as far ahead as there are stages. Two groups of four warps compute a
block of queries each. A group multiplies the probabilities of a block of keys by its values while
it turns the scores of the next into probabilities; the other group fills the rest of the time.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6 knows the old name alone, 3.9 the new.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e30)  # of a running maximum: a query without a key must leave no NaN
# Of a thread: of the 65,536 of an SM, what 4 warps that copy (3 idle) leave to 8 that compute.
COPY_REGISTERS = gl.constexpr(24)
COMPUTE_REGISTERS = gl.constexpr(240)


@gluon.jit
def attention_fwd_gluon_kernel(
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
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    q_row, kv_row = batch * num_queries + low, batch * num_keys
    q_column, k_column = head * q_head_stride, kv_head * k_head_stride
    v_column, out_stride = kv_head * v_head_stride, num_heads * HEAD_DIM
    gl.warp_specialize(
        [
            (attend, (
                q_tile, k_tile, v_tile, q_full, k_full, v_full, v_free,
                out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys,
                out_stride, first_key, whole_key, ragged_key, end_key,
                0, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (attend, (
                q_tile, k_tile, v_tile, q_full, k_full, v_full, v_free,
                out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys,
                out_stride, first_key, whole_key, ragged_key, end_key,
                1, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (copy, (
                q_desc, k_desc, v_desc, q_tile, k_tile, v_tile,
                q_full, k_full, v_full, v_free,
                q_row, q_column, kv_row, k_column, v_column, first_key, end_key,
                BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def program_ids(num_blocks, num_heads, num_kv_heads):
    """Return the batch, KV head, head and block of queries of a program.

    Heads that share keys are neighbours. The last block, which may have the most keys, is first.
    """
    program, heads_per_kv_head = gl.program_id(0), num_heads // num_kv_heads
    head, program = program % heads_per_kv_head, program // heads_per_kv_head
    block, program = num_blocks - 1 - program % num_blocks, program // num_blocks
    kv_head, batch = program % num_kv_heads, program // num_kv_heads
    return batch, kv_head, kv_head * heads_per_kv_head + head, block


@gluon.jit
def clip(i, end):
    return gl.minimum(gl.maximum(i, 0), end)


@gluon.jit
def keys_of_block(
    first_ptr, end_ptr, offset, low, num_queries, num_keys,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Return where keys to which any query attends begin, those to which all do, ragged ones, end.

    All but the end lie a multiple of ``BLOCK_N`` from the first.
    """
    high = gl.minimum(low + BLOCK_M, num_queries) - 1
    if first_ptr is None:
        first_key, end_key = 0, clip(high + offset, num_keys)
        whole_key, end_whole = 0, clip(low + offset, num_keys)
    else:
        first_key, end_key = gl.load(first_ptr + low), gl.load(end_ptr + high)
        first_whole, end_whole = gl.load(first_ptr + high), gl.load(end_ptr + low)
        masked = (first_whole - first_key + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        whole_key = gl.minimum(first_key + masked, end_key)
    ragged_key = whole_key + gl.maximum(end_whole - whole_key, 0) // BLOCK_N * BLOCK_N
    return first_key, whole_key, ragged_key, end_key


@gluon.jit
def keys_of_rows(
    first_ptr, end_ptr, i, offset, num_queries, num_keys,
    LAYOUT: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Return the first key to which each query attends, and how many they are."""
    if first_ptr is None:
        first = gl.zeros([BLOCK_M], gl.int32, LAYOUT)
        length = clip(i + offset, num_keys)
    else:
        row = gl.minimum(i + 1, num_queries) - 1
        first = gl.load(first_ptr + row)
        length = gl.maximum(gl.load(end_ptr + row) - first, 0)
    return first, length


@gluon.jit
def copy(
    q_desc, k_desc, v_desc, q_tile, k_tile, v_tile, q_full, k_full, v_full, v_free,
    q_row, q_column, kv_row, k_column, v_column, first_key, end_key,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then each block of keys and of values once its stage is free.

    Both groups free values. The keys that were in a stage were read before: they are copied over
    after values were freed that are multiplied later than those keys. The first of them are read
    before the first values are freed.
    """
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    for group in gl.static_range(2):
        row = q_row + group * BLOCK_M
        async_load(q_desc, [row, q_column], q_full, q_tile.index(group))
    for start in range(first_key, end_key, BLOCK_N):
        nth, row = (start - first_key) // BLOCK_N, kv_row + start
        stage, phase = nth % STAGES, nth // STAGES & 1
        full, tile = k_full.index(stage), k_tile.index(stage)
        if nth == STAGES:
            mbarrier.wait(v_free.index(0), 0)
        mbarrier.expect(full, k_desc.block_type.nbytes)
        async_load(k_desc, [row, k_column], full, tile)
        full, tile = v_full.index(stage), v_tile.index(stage)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(full, v_desc.block_type.nbytes)
        async_load(v_desc, [row, v_column], full, tile)


@gluon.jit
def attend(
    q_tile, k_tile, v_tile, q_full, k_full, v_full, v_free,
    out_ptr, lse_ptr, first_ptr, end_ptr, offset, scale, low, num_queries, num_keys, out_stride,
    first_key, whole_key, ragged_key, end_key,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute a block of queries: scores of the first keys, then probabilities a block behind."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])  # noqa: N806
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])  # noqa: N806
    low += GROUP * BLOCK_M
    i = low + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SCORES))
    first, length = keys_of_rows(
        first_ptr, end_ptr, i, offset, num_queries, num_keys, gl.SliceLayout(1, SCORES), BLOCK_M
    )
    dtype: gl.constexpr = q_tile.dtype
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT)
    l_i = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORES))
    m_i = gl.full([BLOCK_M], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    log2_scale = scale * LOG2E
    mbarrier.wait(q_full, 0)
    q = q_tile.index(GROUP)
    if first_key < end_key:
        mbarrier.wait(k_full.index(0), 0)
        zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
        keys = k_tile.index(0).permute((1, 0))
        scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, (scores,))
        p, _, l_i, m_i = softmax(
            scores, l_i, m_i, first_key, first, length, log2_scale, True, SCORES, dtype, BLOCK_N
        )
        p = operand(p, OUT)
        nth, second = 1, first_key + BLOCK_N
        if first_ptr is not None:
            acc, l_i, m_i, p, nth = attend_blocks(
                q, k_tile, v_tile, k_full, v_full, v_free, acc, l_i, m_i, p, nth,
                second, whole_key, first, length, log2_scale, True, SCORES, OUT, dtype,
                BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        acc, l_i, m_i, p, nth = attend_blocks(
            q, k_tile, v_tile, k_full, v_full, v_free, acc, l_i, m_i, p, nth,
            gl.maximum(whole_key, second), ragged_key, first, length, log2_scale, False,
            SCORES, OUT, dtype, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        acc, l_i, m_i, p, nth = attend_blocks(
            q, k_tile, v_tile, k_full, v_full, v_free, acc, l_i, m_i, p, nth,
            gl.maximum(ragged_key, second), end_key, first, length, log2_scale, True,
            SCORES, OUT, dtype, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        last, phase = (nth - 1) % STAGES, (nth - 1) // STAGES & 1
        mbarrier.wait(v_full.index(last), phase)
        acc = warpgroup_mma(p, v_tile.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))

    lse, l_i = log_of_sum(l_i, m_i, log2_scale)
    gl.store(lse_ptr + i, lse, mask=i < num_queries)
    acc *= gl.convert_layout(1 / l_i, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
    store_rows(out_ptr, acc, low, num_queries, out_stride, dtype, HEAD_DIM, BLOCK_M)


@gluon.jit
def store_rows(
    ptr, x, low, num_rows, stride, dtype: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    """Store rows from ``low`` on, of which there are ``num_rows``: 16 bytes a thread, by rows."""
    LANES: gl.constexpr = [256 // HEAD_DIM, HEAD_DIM // 8]  # noqa: N806
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], LANES, [4, 1], [1, 0])  # noqa: N806
    i = low + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ROWS))
    c = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    ptrs = ptr + i.to(gl.int64)[:, None] * stride + c[None, :]
    gl.store(ptrs, gl.convert_layout(x.to(dtype), ROWS), mask=(i < num_rows)[:, None])


@gluon.jit
def places_in_block(BLOCK: gl.constexpr):
    """Return ``arange(BLOCK)`` in shared memory: where it is masked, a thread has no registers."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])  # noqa: N806
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # noqa: N806
    places = gl.arange(0, BLOCK, layout=LINE)
    return gl.allocate_shared_memory(gl.int32, [BLOCK], SHARED, places)


@gluon.jit
def attend_blocks(
    q, k_tile, v_tile, k_full, v_full, v_free, acc, l_i, m_i, p, nth,
    start_key, end_key, first, length, log2_scale, MASKED: gl.constexpr,
    SCORES: gl.constexpr, OUT: gl.constexpr, dtype: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Turn blocks of keys from block ``nth`` on into ``p``, and add the ``p`` of the one before."""
    for start in range(start_key, end_key, BLOCK_N):
        stage, phase = nth % STAGES, nth // STAGES & 1
        before, phase_before = (nth - 1) % STAGES, (nth - 1) // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
        keys = k_tile.index(stage).permute((1, 0))
        scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), phase_before)
        acc = warpgroup_mma(p, v_tile.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        p, alpha, l_i, m_i = softmax(
            scores, l_i, m_i, start, first, length, log2_scale, MASKED, SCORES, dtype, BLOCK_N
        )
        p = operand(p, OUT)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(v_free.index(before), count=1)
        acc *= gl.convert_layout(alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
        nth += 1
    return acc, l_i, m_i, p, nth


@gluon.jit
def softmax(
    scores, l_i, m_i, start, first, length, log2_scale, MASKED: gl.constexpr,
    SCORES: gl.constexpr, dtype: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Return probabilities, the factor of what was summed before, and the new sum and maximum."""
    if MASKED:
        scores = masked(scores, start, first, length, SCORES, BLOCK_N)
    m_new = gl.maximum(m_i, gl.max(scores, 1))
    p = gl.exp2(scores * log2_scale - (m_new * log2_scale)[:, None])
    alpha = gl.exp2((m_i - m_new) * log2_scale)
    l_i = l_i * alpha + gl.sum(p, 1)
    return p.to(dtype), alpha, l_i, m_new


@gluon.jit
def masked(scores, start, first, length, SCORES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return ``scores``, -inf where the query does not attend to the key."""
    j = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    visible = (j[None, :] - first[:, None]).to(gl.uint32) < length[:, None].to(gl.uint32)
    return gl.where(visible, scores, -float("inf"))


@gluon.jit
def operand(p, OUT: gl.constexpr):
    """Return ``p`` as an operand of ``acc``: both layouts are that of a warp group's matmul."""
    return gl.convert_layout(p, gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def log_of_sum(l_i, m_i, log2_scale):
    """Return the lse, and the sum by which to divide: 1 for a query without a key."""
    has_keys = l_i > 0
    l_i = gl.where(has_keys, l_i, 1)
    return gl.where(has_keys, (m_i * log2_scale + gl.log2(l_i)) * LN2, -float("inf")), l_i
