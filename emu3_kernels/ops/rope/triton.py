"""rope in Triton: q and k in one launch, a program for a few heads of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels._triton import Config, Contract, meta, next_power_of_2, why_not_triton

# Pairs of a program. Of each half, a thread holds 16 elements with a warp of 32 lanes, 8 (the 16
# bytes of one access) with 64.
BLOCK, NUM_WARPS = 512, 1


def why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return why_not_triton(q)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    rotated_q, rotated_k = q.new_empty(q.shape), k.new_empty(k.shape)
    batch, tokens, num_heads, width = q.shape
    half = next_power_of_2(max(width // 2, 1))
    heads = max(BLOCK // half, 1)
    blocks = triton.cdiv(num_heads, heads), triton.cdiv(k.shape[2], heads)
    if rotated_q.numel() + rotated_k.numel():
        _fwd_kernel[(batch * tokens, sum(blocks))](
            q, k, cos, sin, positions, rotated_q, rotated_k,
            *q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0),
            *((0, 0) if positions is None else positions.stride()),
            tokens, num_heads, k.shape[2], width // 2, blocks[0],
            HEADS=heads, HALF=half, INVERSE=inverse, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return rotated_q, rotated_k


@triton.jit
def _rotate(
    x_ptr, out_ptr, head_stride, block, num_heads, half, cos, sin,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out = (first * cos - second * sin, second * cos + first * sin) in a block of heads."""
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    c = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (c < half)
    x_ptr += head.to(tl.int64) * head_stride + c
    out_ptr += head.to(tl.int64) * (2 * half) + c
    first = tl.load(x_ptr, mask=inside, other=0).to(tl.float32)
    second = tl.load(x_ptr + half, mask=inside, other=0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptr + half, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, rotated_q_ptr, rotated_k_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    cos_stride, sin_stride, positions_batch_stride, positions_token_stride,
    tokens, num_heads, num_groups, half, num_q_blocks,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of q, or of k where those of q are done; backwards if INVERSE."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    position = token
    if positions_ptr is not None:
        position = tl.load(
            positions_ptr + batch * positions_batch_stride + token * positions_token_stride
        )
    c = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + position * cos_stride + c, mask=c < half, other=0)
    sin = tl.load(sin_ptr + position * sin_stride + c, mask=c < half, other=0)
    if INVERSE:
        sin = -sin
    block = tl.program_id(1)
    if block < num_q_blocks:
        x_ptr = q_ptr + batch * q_batch_stride + token * q_token_stride
        out_ptr = rotated_q_ptr + row * num_heads * (2 * half)
        _rotate(x_ptr, out_ptr, q_head_stride, block, num_heads, half, cos, sin, HEADS, HALF)
    else:
        block -= num_q_blocks
        x_ptr = k_ptr + batch * k_batch_stride + token * k_token_stride
        out_ptr = rotated_k_ptr + row * num_groups * (2 * half)
        _rotate(x_ptr, out_ptr, k_head_stride, block, num_groups, half, cos, sin, HEADS, HALF)


def _packed(tokens: int, positions: Tensor | None, *, inverse: bool) -> None:
    """Emu3-8B: 32 heads of q, 8 of k and of v, 128 wide, in one projection."""
    q, k, _ = meta(1, tokens, 48, 128).split((32, 8, 8), dim=2)
    tables = (meta(131072, 64, dtype=torch.float32) for _ in range(2))
    rotate(q, k, *tables, positions, inverse=inverse)


# 64 registers keep 32 programs of one warp, all that a multiprocessor takes, in half of its 65,536.
# Narrow are cos and sin, the 64 float32 of a token over the lanes of a warp, and its position.
TABLES = Contract(max_registers=64, scalar_loads=2)
TABLES_AND_POSITION = Contract(max_registers=64, scalar_loads=3)
CONFIGS = (
    Config("2048, packed", lambda: _packed(2048, None, inverse=False), {"_fwd_kernel": TABLES}),
    Config(
        "2048, packed, inverse", lambda: _packed(2048, None, inverse=True), {"_fwd_kernel": TABLES}
    ),
    Config(
        "1, packed, at its position",
        lambda: _packed(1, meta(1, 1, dtype=torch.int64), inverse=False),
        {"_fwd_kernel": TABLES_AND_POSITION},
    ),
)
