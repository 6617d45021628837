"""rope in Triton: q and k in one launch, a program for a few heads of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.rope.triton_heads import load_rotation, options, rotate_heads
from emu3_kernels.runtime.launch import Config, Contract, meta, why_not_triton


def why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> str | None:
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
    inverse: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    rotated_q, rotated_k = out or (q.new_empty(q.shape), k.new_empty(k.shape))
    batch, tokens, num_heads, width = q.shape
    how = options(width)
    blocks = [triton.cdiv(heads, how["HEADS"]) for heads in (num_heads, k.shape[2])]
    if q.numel() + k.numel():
        _fwd_kernel[(batch * tokens, sum(blocks))](
            q, k, cos, sin, positions, rotated_q, rotated_k,
            *q.stride()[:3], *k.stride()[:3], *rotated_q.stride()[:3], *rotated_k.stride()[:3],
            cos.stride(0), sin.stride(0), *((0, 0) if positions is None else positions.stride()),
            tokens, num_heads, k.shape[2], width // 2, blocks[0], INVERSE=inverse, **how,
        )  # fmt: skip
    return rotated_q, rotated_k


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, rotated_q_ptr, rotated_k_ptr,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    rotated_q_batch_stride, rotated_q_token_stride, rotated_q_head_stride,
    rotated_k_batch_stride, rotated_k_token_stride, rotated_k_head_stride,
    cos_stride, sin_stride, positions_batch_stride, positions_token_stride,
    tokens, num_heads, num_groups, half, num_q_blocks,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of q, or of k where those of q are done; backwards if INVERSE."""
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
            block - num_q_blocks, num_groups, half, cos, sin, HEADS, HALF,
        )  # fmt: skip


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
