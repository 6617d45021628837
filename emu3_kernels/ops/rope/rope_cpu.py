"""rope on the CPU: csrc/cpu/rope.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return library.why_not_cpu(q)


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
    if out is None:
        return torch.ops.emu3_kernels.rope(q, k, cos, sin, positions, inverse)
    torch.ops.emu3_kernels.rope_out(q, k, cos, sin, positions, *out)
    return out


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::rope")
    def _(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @torch.library.register_fake("emu3_kernels::rope_out")
    def _(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        q_out: Tensor,
        k_out: Tensor,
    ) -> None: ...
