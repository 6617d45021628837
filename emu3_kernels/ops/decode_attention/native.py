"""decode_attention on the CPU (csrc/cpu/decode_attention.cpp) and on a GPU (csrc/cuda)."""

import torch
from torch import Tensor

from emu3_kernels import _native


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "a cache without unit stride in K is left to the reference"
    return _native.why_not_cpu(q)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    scale: float,
) -> Tensor:
    q = q if q.stride(-1) == 1 else q.contiguous()
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    return torch.ops.emu3_kernels.decode_attention(q, k_cache, v_cache, lengths, page_table, scale)


if not _native.MISSING:

    @torch.library.register_fake("emu3_kernels::decode_attention")
    def _(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        page_table: Tensor | None,
        scale: float,
    ) -> Tensor:
        return q.new_empty(q.shape)
