"""ring_attention on the CPU: emu3_kernels/_attention/native.py on the keys of every hop."""

from torch import Tensor

from emu3_kernels.ops.attention import cpu as native
from emu3_kernels.ops.attention.cpu import backward, forward

__all__ = ["backward", "forward", "why_not"]


def why_not(q: Tensor, k: Tensor, *_: object) -> str | None:
    return native.why_not(q, k)
