"""causal_conv3d in Triton: emu3_kernels/_causal_conv/{forward,backward}_triton.py."""

import torch

from emu3_kernels._causal_conv.backward_triton import backward
from emu3_kernels._causal_conv.blocks_triton import why_not
from emu3_kernels._causal_conv.forward_triton import forward
from emu3_kernels._causal_conv.plan import Plan, out_shape
from emu3_kernels._triton import meta

__all__ = ["CONFIGS", "backward", "forward", "why_not"]


def _call(
    *shape: int,
    out: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    plan: Plan = Plan(silu=True),
    dtype: torch.dtype = torch.bfloat16,
    backwards: bool = False,
) -> None:
    """Launch with everything fused that there is."""
    x, weight = meta(*shape, dtype=dtype), meta(out, shape[1], *kernel, dtype=dtype)
    norm = (meta(shape[1], dtype=dtype) for _ in range(2))
    bias, y = meta(out, dtype=dtype), meta(*out_shape(x, weight, plan), dtype=dtype)
    if backwards:
        backward(y, x, weight, bias, *norm, plan)
    else:
        forward(x, weight, bias, *norm, y, plan)


CONFIGS = ()
