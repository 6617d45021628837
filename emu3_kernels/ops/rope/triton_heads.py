"""What rope and rope_append share in Triton: a block of the heads of one token."""

import triton
import triton.language as tl

from emu3_kernels.runtime.launch import next_power_of_2

# Pairs of a program. Of each half, a thread holds 16 elements with a warp of 32 lanes, 8 (the 16
# bytes of one access) with 64.
BLOCK, NUM_WARPS = 512, 1


def options(width: int) -> dict[str, int | bool]:
    """Return the keywords of a launch for heads of ``width``."""
    half = next_power_of_2(max(width // 2, 1))
    return {
        "HEADS": max(BLOCK // half, 1),
        "HALF": half,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


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
    """Point at the first halves of a block of heads, in and out, and say which are inside."""
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
