"""The family's CPU C++: csrc/cpu, attention.cpp, attention_backward.cpp, decode_attention.cpp."""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges
from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

MAX_HEAD_DIM = 256
"""Channels of a head that the kernels' buffers hold."""

MAX_HEADS_PER_KV_HEAD = 1024


def why_not(q: Tensor, k: Tensor, *_: object) -> str | None:
    head_dim, shared = q.shape[-1], q.shape[2] // k.shape[2]
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return (
            f"an odd head_dim or one above {MAX_HEAD_DIM} is left to the reference, got {head_dim}"
        )
    if shared > MAX_HEADS_PER_KV_HEAD:
        return (
            f"more than {MAX_HEADS_PER_KV_HEAD} query heads per KV head are left to the reference, "
            f"got {shared}"
        )
    return library.why_not_cpu(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
    *,
    float32_out: bool = False,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    settings = _settings(q, k, key_ranges, scale, dropout)
    return torch.ops.emu3_kernels.attention(q, k, v, *settings, float32_out)


def whole_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Where one key dominates a row its dq is a difference of nearly equal numbers, and an error of
    # delta is all that is left of it: PyTorch's sum is pairwise.
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse
    return backward(dout, q, k, v, lse, delta, key_ranges, scale, dropout)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
    *,
    float32_out: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = (_unit_stride(x) for x in (dout, q, k, v))
    lse, delta = lse.contiguous(), delta.contiguous()
    settings = _settings(q, k, key_ranges, scale, dropout)
    return torch.ops.emu3_kernels.attention_backward(
        dout, q, k, v, lse, delta, *settings, float32_out
    )


def _unit_stride(heads: Tensor) -> Tensor:
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _settings(
    q: Tensor, k: Tensor, key_ranges: KeyRanges, scale: float, dropout: Dropout | None
) -> tuple:
    first, end = (x.contiguous() for x in key_ranges.tensors(q, k))
    if dropout is None:
        return first, end, scale, 0.0, None, None, None, 0, 0
    masked = dropout.p, dropout.seed, *dropout.positions(q, k), *dropout.numbering(q)
    return first, end, scale, *masked


def why_not_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if k_cache.stride()[3] != 1 or v_cache.stride()[3] != 1:
        return "a cache without unit stride in K is left to the reference"
    return library.why_not_cpu(q)


def decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    page_table: Tensor | None,
) -> Tensor:
    if q.stride()[3] != 1:
        q = q.clone(memory_format=torch.contiguous_format)
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    mask = None if mask is None else mask.contiguous()
    return torch.ops.emu3_kernels.decode_attention(
        q, k_cache, v_cache, lengths, page_table, mask, scale
    )


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::attention")
    def _(
        q, k, v, first, end, scale, dropout_p, seed, rows, columns,
        first_head, all_heads, float32_out,
    ):  # fmt: skip
        batch, num_queries, num_heads, _ = q.shape
        out = q.new_empty(q.shape, dtype=torch.float32 if float32_out else q.dtype)
        return out, q.new_empty((batch, num_heads, num_queries), dtype=torch.float32)

    @torch.library.register_fake("emu3_kernels::attention_backward")
    def _(
        dout, q, k, v, lse, delta, first, end, scale, dropout_p, seed, rows, columns,
        first_head, all_heads, float32_out,
    ):  # fmt: skip
        dtype = torch.float32 if float32_out else q.dtype
        return tuple(x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))

    @torch.library.register_fake("emu3_kernels::decode_attention")
    def _(q, k_cache, v_cache, lengths, page_table, mask, scale):
        return q.new_empty(q.shape)


BACKENDS = {
    "attention": Backend(why_not, forward, whole_backward),
    "ring_attention": Backend(why_not, forward, backward),
    "decode_attention": Backend(why_not_decode, decode_forward),
}
