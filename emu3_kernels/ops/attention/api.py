"""Attention, of whole sequences and of new tokens to a cache.

B batch, T queries, S keys, H query heads, KV key/value heads, K head_dim.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.attention import reference
from emu3_kernels.ops.attention.key_ranges import (
    Documents,
    Dropout,
    KeyRanges,
    QueryRanges,
    check_ascending,
    document_ranges,
    one_document,
)
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import check_grouped_heads, describe
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.runtime.dropout import (
    HeadShard,
    check_dropout,
    check_dropout_heads,
    draw_seed,
)

ATTENTION = Backends(
    "attention",
    __package__,
    reference.attention,
    cpu=("cpu", "sdpa"),
    cuda=("cudnn", "flash_attn", "triton", "triton_gluon", "torch_flash", "xformers", "sdpa"),
)
DECODE_ATTENTION = Backends(
    "decode_attention",
    __package__,
    reference.decode_attention,
    cpu=("cpu", "sdpa"),
    # sdpa needs the lengths on the host and would wait for them: on a GPU it runs by name alone.
    cuda=("triton", "cuda"),
)

MAX_NEW_TOKENS = 64
"""One bit of a word of the mask for each."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | Documents | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_heads: HeadShard | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Average values by the softmax of scores: ``out = softmax(scale * q @ k.T) @ v`` per head.

    Query head h reads KV head ``h // (H/KV)``; keys and values are not copied for it. A causal
    mask aligns the last query with the last key. Scores, softmax and sums are float32 (float64 for
    float64 inputs), probabilities are rounded to the dtype of v before they are multiplied by v,
    and results are rounded once. A query that attends to no key gets 0 and an lse of -inf.

    Differentiable in q, k and v; the inputs, the result and the lse are saved. Gradients repeat bit
    for bit; those of cuDNN, of PyTorch's FlashAttention and of ``sdpa`` on a GPU do not, unless
    ``torch.use_deterministic_algorithms(True)`` leaves cuDNN out and makes the others repeat.
    Blocks of keys to which no query of a block attends are skipped, not masked: the cost of
    documents is that of their own squares.

    From "FlashAttention-2" (Dao, arXiv 2307.08691); grouped heads from "GQA" (Ainslie et al.,
    arXiv 2305.13245).

    Args:
        q: ``[B, T, H, K]``, any floating dtype.
        k: ``[B, S, KV, K]``, H a multiple of KV; dtype and device of ``q``.
        v: as ``k``.
        causal: whether query t attends to key s only if ``s - S <= t - T``.
        document_ids: ``[B, T]`` int32, non-decreasing along T: a query attends only to keys of its
            own document. Needs S = T; None is one document. A model makes one :class:`Documents`
            of them for all its layers.
        scale: factor of the scores; None is ``K ** -0.5``.
        dropout_p: probability in ``[0, 1)`` of dropping a probability after the softmax. Seed, head
            and positions alone decide which are dropped.
        seed: scalar int64 tensor on the device of ``q``; None draws one.
        dropout_heads: which heads of which sequences ``q`` holds of those of all ranks, so that a
            rank drops what the whole would; None is all.
        return_lse: whether to return the logarithm of the softmax's denominator too,
            differentiable.
        backend: a key of ``ATTENTION``, or None for the first that fits.

    Returns:
        ``[B, T, H, K]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, T]`` float32
        (float64 for float64 inputs).
    """
    layout = "q must be [B, T, H, K], k and v [B, S, KV, K]"
    check_grouped_heads("attention", layout, q, k, v, shared=1)
    ids = None
    if document_ids is not None:
        ids = _check_documents(q, k, causal, document_ids)
    check_dropout("attention", dropout_p, seed, q.device)
    if dropout_heads is not None:
        check_dropout_heads("attention", q.shape[2], dropout_heads)
    chosen = ATTENTION.choose(backend, q, k, v, causal, ids, dropout_p, return_lse)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if dropout_p > 0 and seed is None:
        seed = draw_seed(q.device)
    if chosen.function is not None:
        return chosen.function(
            *(q, k, v),
            causal=causal,
            document_ids=document_ids,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            dropout_heads=dropout_heads,
            return_lse=return_lse,
        )
    recorded = needs_gradient(q, k, v)
    if isinstance(document_ids, Documents):
        key_ranges = document_ids.key_ranges
    elif ids is not None:
        key_ranges = document_ranges(ids, causal=causal, with_queries=recorded)
    else:
        key_ranges = one_document(q.shape[1], k.shape[1], causal=causal)
    if recorded:
        first, end, offset, queries = key_ranges
        queries = (None, None) if queries is None else queries[:2]
        ranges = first, end, *queries, offset
        dropout = dropout_p, seed, dropout_heads
        out, lse = _Attention.apply(q, k, v, *ranges, scale, *dropout, chosen)
    else:
        dropout = _dropout(dropout_p, seed, dropout_heads)
        out, lse = chosen.forward(q, k, v, key_ranges, scale, dropout)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, first, end, first_query, end_query, offset, scale, dropout_p, seed, heads,
        backend,
    ):  # fmt: skip
        dropout = _dropout(dropout_p, seed, heads)
        out, lse = backend.forward(q, k, v, KeyRanges(first, end, offset), scale, dropout)
        ctx.save_for_backward(q, k, v, first, end, first_query, end_query, seed, out, lse)
        ctx.settings = offset, scale, dropout_p, heads, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, first, end, first_query, end_query, seed, out, lse = ctx.saved_tensors
        offset, scale, dropout_p, heads, backend = ctx.settings
        dropout = _dropout(dropout_p, seed, heads)
        queries = None if first_query is None else QueryRanges(first_query, end_query)
        key_ranges = KeyRanges(first, end, offset, queries)
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = backend.backward(dout, q, k, v, out, lse, dlse, key_ranges, scale, dropout)
        return *gradients, *[None] * 10


def _dropout(p: float, seed: Tensor | None, heads: HeadShard | None) -> Dropout | None:
    return Dropout(p, seed, heads=heads) if p > 0 else None


def _check_documents(
    q: Tensor, k: Tensor, causal: bool, document_ids: Tensor | Documents
) -> Tensor:
    """Return the ids; those of :class:`Documents` were checked."""
    known = isinstance(document_ids, Documents)
    ids = document_ids.ids if known else document_ids
    if ids.dtype != torch.int32:
        raise TypeError(f"attention: document_ids must be int32, got {ids.dtype}")
    if ids.shape != q.shape[:2] or ids.device != q.device:
        raise ValueError(
            f"attention: document_ids must be {tuple(q.shape[:2])} on {q.device}, "
            f"got {describe(ids)}"
        )
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"attention: document_ids need as many keys as queries, got {k.shape[1]} keys for "
            f"{q.shape[1]} queries"
        )
    if not known:
        check_ascending(ids)
    elif document_ids.causal != causal:
        raise ValueError(
            f"attention: the documents must be made for causal={causal}, got {document_ids.causal}"
        )
    return ids


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    page_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attend from the last tokens of every row: ``out = softmax(scale * q @ k.T) @ v`` per head.

    The queries are the last t of the ``lengths[b]`` positions of row b. Each attends to all keys
    before them, ``j < lengths[b] - t``, and among the t new keys to those of its word of ``mask``,
    by default its own and the earlier ones; one without a key gets 0. Query head h reads KV head
    ``h // (H/KV)``; keys and values are read once for up to 128 queries (on a CPU, for all) of a
    KV head, and nothing beyond ``lengths[b]`` is read. Keys are split among threads or programs,
    whose float32 results are merged by their lse in a fixed order; the result is rounded once and
    does not depend on the number of threads. Not differentiable.

    From "Flash-Decoding" (Dao et al., 2023); pages from "PagedAttention" (Kwon et al., arXiv
    2309.06180).

    Args:
        q: ``[B, t, H, K]``, t from 1 to 64, any floating dtype.
        k_cache: ``[B, S, KV, K]``, any strides in B, S and KV, or ``[pages, page, KV, K]`` with a
            ``page_table``; H a multiple of KV; dtype and device of ``q``.
        v_cache: shape, dtype and device of ``k_cache``.
        lengths: ``[B]`` int32, at most S, keys of each row, the t new ones included. Its values and
            those of the page table are checked in eager calls on a CPU; elsewhere the caller
            guarantees them.
        mask: ``[B, t]`` int64, words of 64 bits: new token i attends to new token j if
            ``mask[b, i] >> j & 1``, which for a tree of drafts are i and its ancestors. Bit 63 is
            the sign. Bits from t on have no key and are ignored. None is causal.
        scale: factor of the scores; None is ``K ** -0.5``.
        page_table: ``[B, max_pages]`` int32: key j of row b is key ``j % page`` of page
            ``page_table[b, j // page]``. Entries beyond the keys of a row are not read.
        backend: a key of ``DECODE_ATTENTION``, or None for the first that fits.

    Returns:
        ``[B, t, H, K]`` in the dtype of ``q``.
    """
    layout = "q must be [B, t, H, K] and the caches alike, [B, S, KV, K] or [pages, page, KV, K],"
    check_grouped_heads("decode_attention", layout, q, k_cache, v_cache, shared=0)
    _check_rows(q, k_cache, lengths, page_table, mask)
    if needs_gradient(q, k_cache, v_cache):
        raise ValueError("decode_attention: has no gradient, got inputs that require one")
    chosen = DECODE_ATTENTION.choose(backend, q, k_cache, v_cache, page_table, mask)
    if q.is_cpu and chosen is not DECODE_ATTENTION["cpu"]:  # whose kernel checks them itself
        _check_values(k_cache, lengths, page_table)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    run = chosen.function or chosen.forward
    return run(q, k_cache, v_cache, lengths, mask=mask, scale=scale, page_table=page_table)


def _check_rows(
    q: Tensor,
    k_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    mask: Tensor | None,
) -> None:
    (batch, num_new, *_), device = q.shape, q.device
    if not 1 <= num_new <= MAX_NEW_TOKENS:
        raise ValueError(
            f"decode_attention: the new tokens must be 1 to {MAX_NEW_TOKENS}, got {num_new}"
        )
    if lengths.dtype != torch.int32:
        raise TypeError(f"decode_attention: lengths must be int32, got {lengths.dtype}")
    if lengths.shape != (batch,) or lengths.device != device:
        raise ValueError(
            f"decode_attention: lengths must be ({batch},) on {device}, got {describe(lengths)}"
        )
    if mask is not None:
        if mask.dtype != torch.int64:
            raise TypeError(f"decode_attention: mask must be int64, got {mask.dtype}")
        if mask.shape != (batch, num_new) or mask.device != device:
            raise ValueError(
                f"decode_attention: mask must be ({batch}, {num_new}) on {device}, "
                f"got {describe(mask)}"
            )
    if page_table is not None:
        if page_table.dtype != torch.int32:
            raise TypeError(f"decode_attention: page_table must be int32, got {page_table.dtype}")
        if page_table.dim() != 2 or len(page_table) != batch or page_table.device != device:
            raise ValueError(
                f"decode_attention: page_table must be [{batch}, max_pages] on {device}, "
                f"got {describe(page_table)}"
            )
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"decode_attention: the caches must have a row for each of the {batch} of q, "
            f"got {len(k_cache)}"
        )


def _check_values(k_cache: Tensor, lengths: Tensor, page_table: Tensor | None) -> None:
    """Check the values of CPU tensors; a traced call has none."""
    if torch.compiler.is_compiling() or not len(lengths):
        return
    num_pages, page = k_cache.shape[:2]
    capacity = page if page_table is None else page * page_table.shape[1]
    values = lengths.tolist()
    low, high = min(values), max(values)
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
        if low < 0 or high >= num_pages:
            raise ValueError(
                f"decode_attention: pages must lie in [0, {num_pages}), got {low} … {high}"
            )
