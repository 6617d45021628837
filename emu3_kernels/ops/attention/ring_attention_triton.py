"""ring_attention in Triton: emu3_kernels/_attention on the keys of every hop."""

from torch import Tensor

from emu3_kernels.ops.attention import triton_blocks as blocks_triton
from emu3_kernels.ops.attention.triton_backward import backward
from emu3_kernels.ops.attention.triton_forward import forward

__all__ = ["backward", "forward", "why_not"]


def why_not(q: Tensor, *_: object) -> str | None:
    return blocks_triton.why_not(q)
