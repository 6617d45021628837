"""rope and rope_append in Triton: a program for a few heads of one token. See api.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.checks import unit_stride
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, next_power_of_2, tile, why_not_triton

# Pairs of channels of a program. Of each half of a head, a thread holds 16 elements with a warp of
# 32 threads, 8 (the 16 bytes of one access) with 64.
BLOCK, MAX_HALF = 512, 1 << 20
TILES = {
    1 << i: tile(1, HEADS=max(BLOCK >> i, 1), HALF=1 << i) for i in range(MAX_HALF.bit_length())
}
"""Options of a launch by the power of two that holds half a head."""


def why_not(q: Tensor, cos: Tensor) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return why_not_triton(q)


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *,
    inverse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    (q, q_strides), (k, k_strides) = unit_stride(q), unit_stride(k)
    (cos, cos_stride), (sin, sin_stride) = unit_stride(cos), unit_stride(sin)
    rotated_q, rotated_k = out or (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)
    )
    if batch and tokens and head_dim and num_heads + num_kv_heads:
        half = head_dim // 2
        options = TILES[next_power_of_2(half)]
        q_blocks, k_blocks = (cdiv(n, options["HEADS"]) for n in (num_heads, num_kv_heads))
        launch(
            rope_kernel, (batch * tokens, q_blocks + k_blocks),
            q, k, cos, sin, positions, rotated_q, rotated_k, *q_strides, *k_strides,
            *rotated_q.stride()[:3], *rotated_k.stride()[:3], *cos_stride, *sin_stride,
            *((0, 0) if positions is None else positions.stride()),
            tokens, num_heads, num_kv_heads, half, q_blocks, INVERSE=inverse, **options,
        )  # fmt: skip
    return rotated_q, rotated_k


def append(
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
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    (q, q_strides), (k, k_strides), (v, v_strides) = map(unit_stride, (q, k, v))
    (cos, cos_stride), (sin, sin_stride) = unit_stride(cos), unit_stride(sin)
    rotated_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch and tokens and head_dim and num_heads + num_kv_heads:
        half = head_dim // 2
        options = TILES[next_power_of_2(half)]
        heads = options["HEADS"]
        q_blocks, k_blocks = cdiv(num_heads, heads), cdiv(num_kv_heads, heads)
        launch(
            rope_append_kernel, (batch * tokens, q_blocks + 2 * k_blocks),
            q, k, v, cos, sin, rotated_q, key_cache, value_cache, slots, positions,
            *q_strides, *k_strides, *v_strides, *cos_stride, *sin_stride,
            *key_cache.stride()[:3], *value_cache.stride()[:3],
            *slots.stride(), *positions.stride(),
            tokens, num_heads, num_kv_heads, half, q_blocks, k_blocks, **options,
        )  # fmt: skip
    return rotated_q


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, rotated_q_ptr, rotated_k_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    rotated_q_batch_stride, rotated_q_token_stride, rotated_q_head_stride,
    rotated_k_batch_stride, rotated_k_token_stride, rotated_k_head_stride,
    cos_stride, sin_stride, positions_batch_stride, positions_token_stride,
    tokens, num_heads, num_kv_heads, half, num_q_blocks,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of q, or of k after those of q; by -angle if INVERSE."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    position = token
    if positions_ptr is not None:
        position = tl.load(
            positions_ptr + batch * positions_batch_stride + token * positions_token_stride
        )
    cos, sin = load_rotation(cos_ptr, sin_ptr, cos_stride, sin_stride, position, half, HALF)
    if INVERSE:
        sin = -sin
    block = tl.program_id(1)
    if block < num_q_blocks:
        q_ptr += batch * q_batch_stride + token * q_token_stride
        rotated_q_ptr += batch * rotated_q_batch_stride + token * rotated_q_token_stride
        rotate_heads(
            q_ptr, rotated_q_ptr, q_head_stride, rotated_q_head_stride,
            block, num_heads, half, cos, sin, HEADS, HALF,
        )  # fmt: skip
    else:
        k_ptr += batch * k_batch_stride + token * k_token_stride
        rotated_k_ptr += batch * rotated_k_batch_stride + token * rotated_k_token_stride
        rotate_heads(
            k_ptr, rotated_k_ptr, k_head_stride, rotated_k_head_stride,
            block - num_q_blocks, num_kv_heads, half, cos, sin, HEADS, HALF,
        )  # fmt: skip


@triton.jit
def rope_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, rotated_q_ptr, key_cache_ptr, value_cache_ptr,
    slots_ptr, positions_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, cos_stride, sin_stride,
    key_batch_stride, key_slot_stride, key_head_stride,
    value_batch_stride, value_slot_stride, value_head_stride,
    slots_batch_stride, slots_token_stride, positions_batch_stride, positions_token_stride,
    tokens, num_heads, num_kv_heads, half, num_q_blocks, num_k_blocks,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of q, or of k into its cache; or copy one of v into its cache."""
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
            block - num_q_blocks, num_kv_heads, half, cos, sin, HEADS, HALF,
        )  # fmt: skip
    else:
        v_ptr += batch * v_batch_stride + token * v_token_stride
        value_cache_ptr += batch * value_batch_stride + slot * value_slot_stride
        copy_heads(
            v_ptr, value_cache_ptr, v_head_stride, value_head_stride,
            block - num_q_blocks - num_k_blocks, num_kv_heads, half, HEADS, HALF,
        )  # fmt: skip


@triton.jit
def load_rotation(cos_ptr, sin_ptr, cos_stride, sin_stride, position, half, HALF: tl.constexpr):
    c = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + position * cos_stride + c, mask=c < half, other=0)
    sin = tl.load(sin_ptr + position * sin_stride + c, mask=c < half, other=0)
    return cos, sin


@triton.jit
def _heads_of(
    x_ptr, out_ptr, x_stride, out_stride, block, num_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Return pointers to the first halves of a block of heads, in and out, and the mask."""
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    c = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (c < half)
    head = head.to(tl.int64)
    return x_ptr + head * x_stride + c, out_ptr + head * out_stride + c, inside


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, x_stride, out_stride, block, num_heads, half, cos, sin,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out = (first * cos - second * sin, second * cos + first * sin) in a block of heads."""
    x_ptr, out_ptr, inside = _heads_of(
        x_ptr, out_ptr, x_stride, out_stride, block, num_heads, half, HEADS, HALF
    )
    first = tl.load(x_ptr, mask=inside, other=0).to(tl.float32)
    second = tl.load(x_ptr + half, mask=inside, other=0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptr + half, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def copy_heads(
    x_ptr, out_ptr, x_stride, out_stride, block, num_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    x_ptr, out_ptr, inside = _heads_of(
        x_ptr, out_ptr, x_stride, out_stride, block, num_heads, half, HEADS, HALF
    )
    tl.store(out_ptr, tl.load(x_ptr, mask=inside), mask=inside)
    tl.store(out_ptr + half, tl.load(x_ptr + half, mask=inside), mask=inside)


BACKENDS = {"rope": Backend(why_not, rotate, rotate), "rope_append": Backend(why_not, append)}
