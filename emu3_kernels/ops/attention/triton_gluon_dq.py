"""Attention in Gluon for sm_90, dq and delta: warps that copy and warps that compute.

A program computes two blocks of queries of one head. One warp copies queries, dout and then blocks
of keys and values to shared memory by tensor descriptors, as far ahead as there are stages. Two
groups of four warps compute a block of queries each: gradients of scores are multiplied from
registers.

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
    keys_of_block,
    keys_of_rows,
    places_in_block,
    program_ids,
    store_rows,
)


@gluon.jit
def attention_bwd_dq_gluon_kernel(
    dq_ptr, delta_ptr, out_ptr, dlse_ptr, lse_ptr, q_desc, k_desc, v_desc, dout_desc,
    first_ptr, end_ptr, range_stride, offset, scale,
    q_head_stride, k_head_stride, v_head_stride, dout_head_stride,
    num_queries, num_keys, num_heads, num_kv_heads,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq = scale * dscores @ k;  dscores = p * (dout @ v - delta)."""
    num_blocks = (num_queries + 2 * BLOCK_M - 1) // (2 * BLOCK_M)
    batch, kv_head, head, block = program_ids(num_blocks, num_heads, num_kv_heads)
    if first_ptr is not None:
        first_ptr += batch.to(gl.int64) * range_stride
        end_ptr += batch.to(gl.int64) * range_stride
    low = block * 2 * BLOCK_M
    first_key, whole_key, ragged_key, end_key = keys_of_block(
        first_ptr, end_ptr, offset, low, num_queries, num_keys, 2 * BLOCK_M, BLOCK_N
    )

    dtype: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_DIM], dout_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], v_desc.layout)
    places = places_in_block(BLOCK_N)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    first_row, nth_head = batch * num_queries * num_heads + head, batch * num_heads + head
    gl.warp_specialize(
        [
            (add_keys, (
                q_tile, dout_tile, k_tile, v_tile, places, q_full, full, free,
                dq_ptr, delta_ptr, out_ptr, dlse_ptr, lse_ptr, first_ptr, end_ptr, offset, scale,
                low, num_queries, num_keys, first_row, nth_head, num_heads,
                first_key, whole_key, ragged_key, end_key, 0, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (add_keys, (
                q_tile, dout_tile, k_tile, v_tile, places, q_full, full, free,
                dq_ptr, delta_ptr, out_ptr, dlse_ptr, lse_ptr, first_ptr, end_ptr, offset, scale,
                low, num_queries, num_keys, first_row, nth_head, num_heads,
                first_key, whole_key, ragged_key, end_key, 1, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (copy_keys, (
                q_desc, k_desc, v_desc, dout_desc, q_tile, dout_tile, k_tile, v_tile,
                q_full, full, free, batch * num_queries + low, batch * num_keys,
                head * q_head_stride, head * dout_head_stride,
                kv_head * k_head_stride, kv_head * v_head_stride,
                first_key, end_key, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def copy_keys(
    q_desc, k_desc, v_desc, dout_desc, q_tile, dout_tile, k_tile, v_tile, q_full, full, free,
    q_row, kv_row, q_column, dout_column, k_column, v_column, first_key, end_key,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy queries and dout, then each block of keys and values once its stage is free."""
    mbarrier.expect(q_full, 4 * q_desc.block_type.nbytes)
    for group in gl.static_range(2):
        row = q_row + group * BLOCK_M
        async_load(dout_desc, [row, dout_column], q_full, dout_tile.index(group))
        async_load(q_desc, [row, q_column], q_full, q_tile.index(group))
    for start in range(first_key, end_key, BLOCK_N):
        nth, row = (start - first_key) // BLOCK_N, kv_row + start
        stage, phase = nth % STAGES, nth // STAGES & 1
        barrier = full.index(stage)
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(barrier, 2 * k_desc.block_type.nbytes)
        async_load(k_desc, [row, k_column], barrier, k_tile.index(stage))
        async_load(v_desc, [row, v_column], barrier, v_tile.index(stage))


@gluon.jit
def add_keys(
    q_tile, dout_tile, k_tile, v_tile, places, q_full, full, free,
    dq_ptr, delta_ptr, out_ptr, dlse_ptr, lse_ptr, first_ptr, end_ptr, offset, scale,
    low, num_queries, num_keys, first_row, nth_head, num_heads,
    first_key, whole_key, ragged_key, end_key,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute dq and delta of a block of queries: a sum over blocks of keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])  # noqa: N806
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])  # noqa: N806
    dtype: gl.constexpr = q_tile.dtype
    low += GROUP * BLOCK_M
    q, dout = q_tile.index(GROUP), dout_tile.index(GROUP)
    mbarrier.wait(q_full, 0)
    out_ptr += first_row.to(gl.int64) * HEAD_DIM
    delta = delta_of_rows(
        dout, out_ptr, low, num_queries, num_heads * HEAD_DIM, SCORES, HEAD_DIM, BLOCK_M
    )
    i = low + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SCORES))
    row = gl.minimum(i, num_queries - 1)
    nth_row = nth_head * num_queries + row
    if dlse_ptr is not None:
        delta -= gl.load(dlse_ptr + nth_row)
    gl.store(delta_ptr + nth_row, delta, mask=i < num_queries)
    lse = gl.load(lse_ptr + nth_row) * LOG2E
    first, length = keys_of_rows(
        first_ptr, end_ptr, i, offset, num_queries, num_keys, gl.SliceLayout(1, SCORES), BLOCK_M
    )
    dq = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT)
    log2_scale = scale * LOG2E
    for start in range(first_key, end_key, BLOCK_N):
        nth = (start - first_key) // BLOCK_N
        stage, phase = nth % STAGES, nth // STAGES & 1
        k, v = k_tile.index(stage), v_tile.index(stage)
        mbarrier.wait(full.index(stage), phase)
        zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        p = gl.exp2(scores * log2_scale - lse[:, None])
        if (start < whole_key) | (start >= ragged_key):
            j = places.load(gl.SliceLayout(0, SCORES))
            j = j[None, :] - (first - start)[:, None]
            p = gl.where(j.to(gl.uint32) < length[:, None].to(gl.uint32), p, 0.0)
        dp = warpgroup_mma_wait(0, (dp,))
        dscores = (p * (dp - delta[:, None])).to(dtype)
        left = gl.convert_layout(dscores, gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
        dq = warpgroup_mma(left, k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(free.index(stage), count=1)
    dq_ptr += first_row.to(gl.int64) * HEAD_DIM
    store_rows(dq_ptr, dq * scale, low, num_queries, num_heads * HEAD_DIM, dtype, HEAD_DIM, BLOCK_M)


@gluon.jit
def delta_of_rows(
    dout, out_ptr, low, num_rows, stride, SCORES: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """Return ``rowsum(dout * out)``."""
    LANES: gl.constexpr = [256 // HEAD_DIM, HEAD_DIM // 8]  # noqa: N806
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], LANES, [4, 1], [1, 0])  # noqa: N806
    row = gl.minimum(low + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ROWS)), num_rows - 1)
    c = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    out = gl.load(out_ptr + row.to(gl.int64)[:, None] * stride + c[None, :])
    products = dout.load(ROWS).to(gl.float32) * out.to(gl.float32)
    return gl.convert_layout(gl.sum(products, 1), gl.SliceLayout(1, SCORES))
