"""rope_append in Triton: one launch, a program for a few heads of q, k or v of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.rope.triton_heads import copy_heads, load_rotation, options, rotate_heads
from emu3_kernels.runtime.launch import Config, Contract, meta, why_not_triton


def why_not(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, *others: Tensor) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return why_not_triton(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    rotated_q = q.new_empty(q.shape)
    batch, tokens, num_heads, width = q.shape
    how = options(width)
    q_blocks, k_blocks = (triton.cdiv(heads, how["HEADS"]) for heads in (num_heads, k.shape[2]))
    if q.numel() + k.numel():
        _append_kernel[(batch * tokens, q_blocks + 2 * k_blocks)](
            q, k, v, cos, sin, rotated_q, key_cache, value_cache, slots, positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], cos.stride(0), sin.stride(0),
            *key_cache.stride()[:3], *value_cache.stride()[:3],
            *slots.stride(), *positions.stride(),
            tokens, num_heads, k.shape[2], width // 2, q_blocks, k_blocks, **how,
        )  # fmt: skip
    return rotated_q


@triton.jit
def _append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, rotated_q_ptr, key_cache_ptr, value_cache_ptr,
    slots_ptr, positions_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, cos_stride, sin_stride,
    key_batch_stride, key_slot_stride, key_head_stride,
    value_batch_stride, value_slot_stride, value_head_stride,
    slots_batch_stride, slots_token_stride, positions_batch_stride, positions_token_stride,
    tokens, num_heads, num_groups, half, num_q_blocks, num_k_blocks,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of q; where those are done, of k into its cache; then copy of v."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    slot = tl.load(slots_ptr + batch * slots_batch_stride + token * slots_token_stride)
    position = tl.load(
        positions_ptr + batch * positions_batch_stride + token * positions_token_stride
    )
    cos, sin = load_rotation(cos_ptr, sin_ptr, cos_stride, sin_stride, position, half, HALF)
    block = tl.program_id(1)
    if block < num_q_blocks:
        q_ptr += batch * q_batch_stride + token * q_token_stride
        rotated_q_ptr += row * num_heads * (2 * half)
        rotate_heads(
            q_ptr, rotated_q_ptr, q_head_stride, 2 * half,
            block, num_heads, half, cos, sin, HEADS, HALF,
        )  # fmt: skip
    elif block < num_q_blocks + num_k_blocks:
        k_ptr += batch * k_batch_stride + token * k_token_stride
        key_cache_ptr += batch * key_batch_stride + slot * key_slot_stride
        rotate_heads(
            k_ptr, key_cache_ptr, k_head_stride, key_head_stride,
            block - num_q_blocks, num_groups, half, cos, sin, HEADS, HALF,
        )  # fmt: skip
    else:
        v_ptr += batch * v_batch_stride + token * v_token_stride
        value_cache_ptr += batch * value_batch_stride + slot * value_slot_stride
        copy_heads(
            v_ptr, value_cache_ptr, v_head_stride, value_head_stride,
            block - num_q_blocks - num_k_blocks, num_groups, half, HEADS, HALF,
        )  # fmt: skip


def _packed(batch: int, tokens: int) -> None:
    """Emu3-8B: 32 heads of q, 8 of k and of v, 128 wide, in one projection; 4,096 slots."""
    heads = meta(batch, tokens, 48, 128).split((32, 8, 8), dim=2)
    tables = (meta(131072, 64, dtype=torch.float32) for _ in range(2))
    caches = (meta(batch, 4096, 8, 128) for _ in range(2))
    indices = (meta(batch, tokens, dtype=torch.int64) for _ in range(2))
    forward(*heads, *tables, *caches, *indices)


# 64 registers keep 32 programs of one warp, all that a multiprocessor takes, in half of its 65,536.
# Narrow are cos and sin, the 64 float32 of a token over the lanes of a warp, its slot and position.
APPENDING = Contract(max_registers=64, scalar_loads=4)
CONFIGS = (
    Config("1, packed", lambda: _packed(1, 1), {"_append_kernel": APPENDING}),
    Config("16 rows of 1, packed", lambda: _packed(16, 1), {"_append_kernel": APPENDING}),
    Config("2 rows of 1024, packed", lambda: _packed(2, 1024), {"_append_kernel": APPENDING}),
)
