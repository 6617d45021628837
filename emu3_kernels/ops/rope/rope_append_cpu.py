"""rope_append on the CPU: csrc/cpu/rope.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library


def why_not(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, *others: Tensor) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return library.why_not_cpu(q)


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
    append = torch.ops.emu3_kernels.rope_append
    return append(q, k, v, cos, sin, key_cache, value_cache, slots, positions)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::rope_append")
    def _(
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
        return q.new_empty(q.shape)
