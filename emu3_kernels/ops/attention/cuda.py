"""decode_attention natively: csrc/cpu/decode_attention.cpp, csrc/cuda/decode_attention.cuh."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library

HAS_CUDA_KERNEL = not library.MISSING and torch._C._dispatch_has_kernel_for_dispatch_key(
    "emu3_kernels::decode_attention", "CUDA"
)
CUDA_WIDTHS = (64, 128)


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if k_cache.stride()[3] != 1 or v_cache.stride()[3] != 1:
        return "a cache without unit stride in K is left to the reference"
    if q.is_cuda and HAS_CUDA_KERNEL:
        return _why_not_cuda(q, k_cache, v_cache)
    return library.why_not_cpu(q)


def _why_not_cuda(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if q.dtype not in library.DTYPES:
        return f"{q.dtype} is left to the others"
    if q.shape[3] not in CUDA_WIDTHS:
        return f"the head width must be 64 or 128, got {q.shape[3]}"
    if not all(_starts_at_16_bytes(cache) for cache in (k_cache, v_cache)):
        return "a cache whose heads do not start at 16 bytes is left to the others"
    return None


def _starts_at_16_bytes(x: Tensor) -> bool:
    """Say so of every head; an allocation does."""
    places = (x.storage_offset(), *x.stride()[:3])
    return all(place * x.element_size() % 16 == 0 for place in places)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    scale: float,
) -> Tensor:
    if q.stride()[3] != 1 or (q.is_cuda and not _starts_at_16_bytes(q)):
        q = q.clone(memory_format=torch.contiguous_format)
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    return torch.ops.emu3_kernels.decode_attention(q, k_cache, v_cache, lengths, page_table, scale)


if not library.MISSING:

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
