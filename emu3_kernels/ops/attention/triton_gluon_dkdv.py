"""Attention in Gluon for sm_90, dk and dv: warps that copy and warps that compute.

A program computes two blocks of keys of one KV head. One warp copies blocks of queries and of dout
to shared memory by tensor descriptors, with their lse and delta, as far ahead as there are stages.
Two groups of four warps compute dk and dv of a block of keys each, with rows of keys: so
probabilities and their gradients are multiplied from registers.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from emu3_kernels.ops.attention.triton_gluon_kernel import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    LOG2E,
    async_load,
    clip,
    places_in_block,
    store_rows,
)


@gluon.jit
def attention_bwd_dkdv_gluon_kernel(
    dk_ptr, dv_ptr, q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc,
    first_ptr, end_ptr, range_stride, offset, scale,
    q_head_stride, k_head_stride, v_head_stride, dout_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads, num_pairs,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk = scale * dscores.T @ q;  dv = p.T @ dout;  summed over the heads of a KV head."""
    # One program an SM: the first blocks of all heads, to which the most queries may attend, are
    # first, so that the last programs to start are the shortest.
    program = gl.program_id(0)
    block, program = program // num_pairs, program % num_pairs
    kv_head, batch = program % num_kv_heads, program // num_kv_heads
    if first_ptr is not None:
        first_ptr += batch.to(gl.int64) * range_stride
        end_ptr += batch.to(gl.int64) * range_stride
    low = block * 2 * BLOCK_N
    first_query, end_query, _, _ = queries_of_block(
        first_ptr, end_ptr, offset, low, num_queries, num_keys, 2 * BLOCK_N
    )
    first_row = batch * num_keys * num_kv_heads + kv_head

    dtype: gl.constexpr = q_desc.dtype
    k_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], dout_desc.layout)
    lse_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    places = places_in_block(BLOCK_M)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    heads_per_kv_head = num_heads // num_kv_heads
    head = kv_head * heads_per_kv_head
    gl.warp_specialize(
        [
            (add_queries, (
                k_tile, v_tile, q_tile, dout_tile, lse_tile, delta_tile, places,
                kv_full, full, free, dk_ptr, dv_ptr, first_ptr, end_ptr, offset, scale,
                low, num_queries, num_keys, first_row, num_kv_heads, heads_per_kv_head,
                first_query, end_query,
                0, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (add_queries, (
                k_tile, v_tile, q_tile, dout_tile, lse_tile, delta_tile, places,
                kv_full, full, free, dk_ptr, dv_ptr, first_ptr, end_ptr, offset, scale,
                low, num_queries, num_keys, first_row, num_kv_heads, heads_per_kv_head,
                first_query, end_query,
                1, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (copy_queries, (
                q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc,
                k_tile, v_tile, q_tile, dout_tile, lse_tile, delta_tile, kv_full, full, free,
                batch * num_queries, batch * num_keys + low, head, batch * num_heads + head,
                kv_head * k_head_stride, kv_head * v_head_stride, q_head_stride, dout_head_stride,
                num_queries, heads_per_kv_head, first_query, end_query, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def queries_of_block(
    first_ptr, end_ptr, offset, low, num_queries, num_keys, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Return the range of queries that attend to any key of a block, and that of those to all."""
    low = gl.minimum(low, num_keys - 1)
    high = gl.minimum(low + BLOCK_N, num_keys) - 1
    if first_ptr is None:
        first, end = clip(low + 1 - offset, num_queries), num_queries
        first_whole, end_whole = clip(high + 1 - offset, num_queries), num_queries
    else:
        first, end = gl.load(first_ptr + low), gl.load(end_ptr + high)
        first_whole, end_whole = gl.load(first_ptr + high), gl.load(end_ptr + low)
    return first, end, first_whole, end_whole


@gluon.jit
def copy_queries(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc,
    k_tile, v_tile, q_tile, dout_tile, lse_tile, delta_tile, kv_full, full, free,
    q_row, kv_row, head, nth_head, k_column, v_column, q_head_stride, dout_head_stride,
    num_queries, heads_per_kv_head, first_query, end_query,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy keys and values, then each block of queries once its stage is free."""
    mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
    for group in gl.static_range(2):
        row = kv_row + group * BLOCK_N
        async_load(k_desc, [row, k_column], kv_full, k_tile.index(group))
        async_load(v_desc, [row, v_column], kv_full, v_tile.index(group))
    nth = 0
    for i in range(heads_per_kv_head):
        q_column, dout_column = (head + i) * q_head_stride, (head + i) * dout_head_stride
        for start in range(first_query, end_query, BLOCK_M):
            stage, phase = nth % STAGES, nth // STAGES & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            barrier, row = full.index(stage), q_row + start
            line = (nth_head + i) * num_queries + start
            mbarrier.expect(barrier, 2 * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes))
            async_load(q_desc, [row, q_column], barrier, q_tile.index(stage))
            async_load(lse_desc, [line], barrier, lse_tile.index(stage))
            async_load(dout_desc, [row, dout_column], barrier, dout_tile.index(stage))
            async_load(delta_desc, [line], barrier, delta_tile.index(stage))
            nth += 1


@gluon.jit
def add_queries(
    k_tile, v_tile, q_tile, dout_tile, lse_tile, delta_tile, places,
    kv_full, full, free, dk_ptr, dv_ptr, first_ptr, end_ptr, offset, scale,
    low, num_queries, num_keys, first_row, num_kv_heads, heads_per_kv_head,
    first_query, end_query,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a block of keys: sums over blocks of queries."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # noqa: N806
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])  # noqa: N806
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)  # noqa: N806
    dtype: gl.constexpr = q_tile.dtype
    low += GROUP * BLOCK_N
    key = gl.minimum(low + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES)), num_keys - 1)
    if first_ptr is None:
        first = clip(key + 1 - offset, num_queries)
        length = num_queries - first
    else:
        first = gl.load(first_ptr + key)
        length = gl.maximum(gl.load(end_ptr + key) - first, 0)
    _, _, first_whole, end_whole = queries_of_block(
        first_ptr, end_ptr, offset, low, num_queries, num_keys, BLOCK_N
    )
    dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, OUT)
    dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, OUT)
    log2_scale = scale * LOG2E
    mbarrier.wait(kv_full, 0)
    k, v = k_tile.index(GROUP), v_tile.index(GROUP)
    num_steps = heads_per_kv_head * ((end_query - first_query + BLOCK_M - 1) // BLOCK_M)
    start = first_query
    for nth in range(num_steps):
        stage, phase = nth % STAGES, nth // STAGES & 1
        q, dout = q_tile.index(stage), dout_tile.index(stage)
        mbarrier.wait(full.index(stage), phase)
        zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES)
        scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        lse = lse_tile.index(stage).load(gl.SliceLayout(0, SCORES)) * LOG2E
        p = gl.exp2(scores * log2_scale - lse[None, :])
        if (start < first_whole) | (start + BLOCK_M > end_whole):
            i = places.load(gl.SliceLayout(0, SCORES))
            i = i[None, :] - (first - start)[:, None]
            visible = i.to(gl.uint32) < length[:, None].to(gl.uint32)
            p = gl.where(visible, p, 0.0)
        left = gl.convert_layout(p.to(dtype), LEFT, assert_trivial=True)
        dv = warpgroup_mma(left, dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, (dp,))
        delta = delta_tile.index(stage).load(gl.SliceLayout(0, SCORES))
        dscores = p * (dp - delta[None, :])
        left = gl.convert_layout(dscores.to(dtype), LEFT, assert_trivial=True)
        dk = warpgroup_mma(left, q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, (dv,))
        dk = warpgroup_mma_wait(0, (dk,))
        mbarrier.arrive(free.index(stage), count=1)
        start += BLOCK_M
        if start >= end_query:
            start = first_query
    at, stride = first_row.to(gl.int64) * HEAD_DIM, num_kv_heads * HEAD_DIM
    store_rows(dk_ptr + at, dk * scale, low, num_keys, stride, dtype, HEAD_DIM, BLOCK_N)
    store_rows(dv_ptr + at, dv, low, num_keys, stride, dtype, HEAD_DIM, BLOCK_N)
