"""Attention of new tokens to a cache of keys and values.

B batch, t new tokens, S keys of a row, H query heads, G key heads, K head width.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.attention import decode_attention_reference as reference
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("decode_attention", "cpu", "triton", "sdpa")

MOST_NEW = 16


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    page_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attend from the last tokens of every row: ``out = softmax(scale * q @ k.T) @ v`` per head.

    The queries are the last t of the ``lengths[b]`` positions of row b, causal among themselves:
    query i sees the keys ``j < lengths[b] - t + i + 1``, and one that sees none gets 0. Query
    head h reads key head ``h // (H/G)``; each key and value is read once for the query heads that
    share it, and what lies beyond ``lengths[b]`` is never read. Keys are split among threads or
    programs, whose float32 results are merged by their logarithms of sums in a fixed order; the
    result is rounded once and does not depend on the number of threads. Not differentiable.

    From "Flash-Decoding" (Dao et al., 2023); pages from "PagedAttention" (Kwon et al., arXiv
    2309.06180).

    Args:
        q: ``[B, t, H, K]``, t from 1 to 16, any floating dtype.
        k_cache: ``[B, S, G, K]``, any strides in B, S and G, or ``[pages, page, G, K]`` with a
            ``page_table``; G a divisor of H; dtype and device of ``q``.
        v_cache: shape, dtype and device of ``k_cache``.
        lengths: ``[B]`` int32, at most S, keys of each row, the t new ones included. Looked at in
            eager calls on a CPU; elsewhere the caller vouches for it, and for the pages.
        scale: factor of the scores; None is ``K ** -0.5``.
        page_table: ``[B, max_pages]`` int32: key j of row b is key ``j % page`` of page
            ``page_table[b, j // page]``. Entries beyond the keys of a row are not read.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, t, H, K]`` in the dtype of ``q``.
    """
    _check_heads(q, k_cache, v_cache)
    _check_rows(q, k_cache, lengths, page_table)
    if needs_gradient(q, k_cache, v_cache):
        raise ValueError("decode_attention: has no gradient, got inputs that require one")
    chosen = choose("decode_attention", BACKENDS, backend, q, k_cache, v_cache, page_table)
    if chosen != "cpu":  # the native kernel looks for itself
        _check_values(q, k_cache, lengths, page_table)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        settings = {"scale": scale, "page_table": page_table}
        return reference.decode_attention(q, k_cache, v_cache, lengths, **settings)
    return BACKENDS[chosen].forward(q, k_cache, v_cache, lengths, page_table, scale)


def _check_heads(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    shape, caches, dtype, device = q.shape, k_cache.shape, q.dtype, q.device
    fits = len(shape) == len(caches) == 4 and shape[3] == caches[3] and caches == v_cache.shape
    alike = dtype == k_cache.dtype == v_cache.dtype
    if not (fits and alike and device == k_cache.device == v_cache.device):
        check_floating("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
        raise ValueError(
            "decode_attention: q must be [B, t, H, K] and the caches alike, [B, S, G, K] or "
            "[pages, page, G, K], of the same dtype and device, got "
            f"{describe(q)}, {describe(k_cache)} and {describe(v_cache)}"
        )
    if not dtype.is_floating_point:
        check_floating("decode_attention", q=q)
    if not 1 <= shape[1] <= MOST_NEW:
        raise ValueError(
            f"decode_attention: the new tokens must be 1 to {MOST_NEW}, got {shape[1]}"
        )
    if caches[2] == 0 or shape[2] % caches[2]:
        raise ValueError(
            f"decode_attention: the {shape[2]} query heads must be a multiple of the key heads, "
            f"got {caches[2]}"
        )


def _check_rows(q: Tensor, k_cache: Tensor, lengths: Tensor, page_table: Tensor | None) -> None:
    batch = q.shape[0]
    _check_int32("lengths", lengths)
    if lengths.shape != (batch,) or lengths.device != q.device:
        raise ValueError(
            f"decode_attention: lengths must be ({batch},) on {q.device}, got {describe(lengths)}"
        )
    if page_table is not None:
        _check_int32("page_table", page_table)
        if page_table.dim() != 2 or len(page_table) != batch or page_table.device != q.device:
            raise ValueError(
                f"decode_attention: page_table must be [{batch}, max_pages] on {q.device}, "
                f"got {describe(page_table)}"
            )
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"decode_attention: the caches must have a row for each of the {batch} of q, "
            f"got {len(k_cache)}"
        )


def _check_values(q: Tensor, k_cache: Tensor, lengths: Tensor, page_table: Tensor | None) -> None:
    """Look at values where that costs no synchronisation: in eager calls on a CPU."""
    if not (len(q) and q.is_cpu) or torch.compiler.is_compiling():
        return
    pages, page = k_cache.shape[:2]
    capacity = page if page_table is None else page * page_table.shape[1]
    low, high = (value.item() for value in lengths.aminmax())
    if low < 0 or high > capacity:
        raise ValueError(
            f"decode_attention: lengths must lie in [0, {capacity}], got {low} … {high}"
        )
    if page_table is None:
        return
    first_key = torch.arange(page_table.shape[1]) * page
    used = page_table[first_key < lengths[:, None]]
    if used.numel():
        low, high = (value.item() for value in used.aminmax())
        if low < 0 or high >= pages:
            raise ValueError(
                f"decode_attention: pages must lie in [0, {pages}), got {low} … {high}"
            )


def _check_int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"decode_attention: {name} must be int32, got {tensor.dtype}")
