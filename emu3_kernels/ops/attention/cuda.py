"""decode_attention in CUDA C++: csrc/cuda/attention/decode_attention.cuh.

For a GPU without Triton. It reads 16 bytes a lane, 8 of them ahead, but multiplies without tensor
cores: on an H200 it took 234 us of 131,072 tokens, Triton 153. More than 8 queries of a KV head
read the keys again for every 8.
"""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

HAS_KERNEL = not library.MISSING and torch._C._dispatch_has_kernel_for_dispatch_key(
    "emu3_kernels::decode_attention", "CUDA"
)
HEAD_DIMS = (64, 128)


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if not HAS_KERNEL:
        return library.MISSING or "the native library was built without CUDA"
    if not q.is_cuda:
        return f"no kernel for a {q.device.type} tensor"
    if q.dtype not in library.DTYPES:
        return f"{q.dtype} is left to the others"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {q.shape[3]}"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "a cache without unit stride in K is left to the reference"
    if not (_is_aligned(k_cache) and _is_aligned(v_cache)):
        return "a cache whose heads are not aligned to 16 bytes is left to the others"
    return None


def _is_aligned(x: Tensor) -> bool:
    """Say whether every head starts at a multiple of 16 bytes, as an allocation does."""
    elements = (x.storage_offset(), *x.stride()[:3])
    return all(n * x.element_size() % 16 == 0 for n in elements)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    page_table: Tensor | None,
) -> Tensor:
    if q.stride(3) != 1 or not _is_aligned(q):
        q = q.clone(memory_format=torch.contiguous_format)
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    mask = None if mask is None else mask.contiguous()
    return torch.ops.emu3_kernels.decode_attention(
        q, k_cache, v_cache, lengths, page_table, mask, scale
    )


BACKENDS = {"decode_attention": Backend(why_not, forward)}
