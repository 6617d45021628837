"""attention on the CPU: emu3_kernels/_attention/native.py."""

from torch import Tensor

from emu3_kernels.ops.attention import cpu as native
from emu3_kernels.ops.attention.cpu import backward, forward

__all__ = ["backward", "forward", "why_not"]


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    return native.why_not(q, k)
