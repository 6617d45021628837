"""Which keys a query attends to: causality and documents, of a whole sequence or of its shards.

B batch, T queries, S keys.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from emu3_kernels.runtime.checks import check_values, describe
from emu3_kernels.runtime.dropout import HeadShard


class QueryRanges(NamedTuple):
    """Queries ``first[j] <= i < end[j]`` attend to key ``j``: ``[1 or B, S]`` int32 each.

    Neither decreases along S. Without tensors ``first`` is ``clip(j + 1 - offset, 0, T)`` and
    ``end`` is T.
    """

    first: Tensor | None
    end: Tensor | None
    offset: int = 0


class KeyRanges(NamedTuple):
    """Query ``i`` attends to the keys ``first[i] <= j < end[i]``: ``[1 or B, T]`` int32 each.

    Neither decreases along T, so the queries that attend to a key are a range too. A
    sequence without documents has no tensors, which would cost the host more than the launch: there
    ``first`` is 0 and ``end`` is ``clip(i + offset, 0, S)``, computed by the kernel.
    """

    first: Tensor | None
    end: Tensor | None
    offset: int = 0
    queries: QueryRanges | None = None
    """What :meth:`query_ranges` returns, where it is computed once for many calls."""

    def tensors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``first`` and ``end`` as tensors, for kernels that read no offset."""
        if self.first is not None:
            return self.first, self.end
        i = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)[None]
        return torch.zeros_like(i), (i + self.offset).clamp(0, k.shape[1])

    def query_ranges(self, num_keys: int) -> QueryRanges:
        """Return the same relation from the side of the keys."""
        if self.queries is not None or self.first is None:
            return self.queries or QueryRanges(None, None, self.offset)
        shape, device = (self.first.shape[0], num_keys), self.first.device
        after = torch.arange(1, num_keys + 1, dtype=torch.int32, device=device).repeat(shape[0], 1)
        first = torch.searchsorted(self.end, after, out_int32=True)
        return QueryRanges(first, torch.searchsorted(self.first, after, out_int32=True))


class Dropout(NamedTuple):
    """Probabilities are dropped with chance ``p``: see ``runtime/dropout.py``.

    ``q_positions [T]`` and ``k_positions [S]``, int32, are rows and columns of the whole sequence,
    and ``heads`` are numbered over the whole batch, so a shard drops what the whole would. None is
    the whole sequence, whose last query has the position of the last key, with all its heads.
    """

    p: float
    seed: Tensor
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    heads: HeadShard | None = None

    def numbering(self, q: Tensor) -> tuple[int, int]:
        """Return the number of head 0 of sequence 0, and that of head 0 of each next one more."""
        heads = self.heads or HeadShard(q.shape[2])
        return heads.first_index, heads.num_heads

    def positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions as tensors, for kernels that count none."""
        if self.k_positions is not None:
            return self.q_positions, self.k_positions
        k_positions = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
        q_positions = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
        q_positions += k.shape[1] - q.shape[1]
        return q_positions, k_positions


def one_document(num_queries: int, num_keys: int, *, causal: bool) -> KeyRanges:
    """Return the key ranges of a sequence without documents, whose last query has the last key."""
    return KeyRanges(None, None, num_keys - num_queries + 1 if causal else num_keys)


def key_ranges_of(
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor | None = None,
    k_documents: Tensor | None = None,
    *,
    causal: bool,
) -> KeyRanges:
    """Find the keys of every query: at its position or before (causal), of its document.

    Args:
        q_positions: ``[T]``, ascending.
        k_positions: ``[S]``, ascending.
        q_documents: ``[B, T]``, non-decreasing along T; None is one document.
        k_documents: ``[B, S]`` likewise.
        causal: whether a key after the query is masked.
    """
    if causal:
        end = torch.searchsorted(k_positions, q_positions, right=True, out_int32=True)[None]
    else:
        end = torch.full_like(q_positions, len(k_positions), dtype=torch.int32)[None]
    if q_documents is None:
        return KeyRanges(torch.zeros_like(end), end)
    documents = k_documents.contiguous(), q_documents.contiguous()
    first = torch.searchsorted(*documents, out_int32=True)
    last = torch.searchsorted(*documents, right=True, out_int32=True)
    return KeyRanges(first, torch.minimum(last, end))


class Documents:
    """The documents of packed rows, checked and searched once for all layers of a model.

    :func:`attention` takes it in place of ``document_ids``, and with it launches nothing but its
    kernels.

    Args:
        document_ids: ``[B, T]`` int32, non-decreasing along T.
        causal: of the calls that take it.
    """

    def __init__(self, document_ids: Tensor, *, causal: bool = True) -> None:
        if document_ids.dim() != 2 or document_ids.dtype != torch.int32:
            raise TypeError(
                f"attention: document_ids must be [B, T] int32, got {describe(document_ids)}"
            )
        check_ascending(document_ids)
        self.ids, self.causal = document_ids, causal
        self.key_ranges = document_ranges(
            document_ids, causal=causal, with_queries=torch.is_grad_enabled()
        )

    @cached_property
    def packed(self) -> tuple[Tensor, int]:
        """Where documents start and how long one is at most; the host waits for both, once."""
        return packed(self.ids)


def check_ascending(document_ids: Tensor) -> None:
    ascending = (document_ids[:, 1:] >= document_ids[:, :-1]).all()
    must = "document_ids must not decrease along T"
    check_values("attention", ascending, must, lambda: str(document_ids.tolist()))


def document_ranges(document_ids: Tensor, *, causal: bool, with_queries: bool = False) -> KeyRanges:
    """Return the key ranges of whole sequences; ``with_queries`` for a backward pass, too."""
    ids = document_ids.contiguous()
    start = torch.searchsorted(ids, ids, out_int32=True)
    if with_queries or not causal:
        stop = torch.searchsorted(ids, ids, right=True, out_int32=True)
    if not causal:
        return KeyRanges(start, stop, queries=QueryRanges(start, stop))
    after = torch.arange(1, ids.shape[1] + 1, dtype=torch.int32, device=ids.device)
    end = torch.maximum(start, after)  # is ``after`` in every row
    return KeyRanges(start, end, queries=QueryRanges(end - 1, stop) if with_queries else None)


def document_starts(document_ids: Tensor) -> Tensor:
    """Return where every document starts in ``[B * T]``, and last ``B * T``: int32, same device.

    Other libraries take documents so. The host waits for their number.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = starts.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([document_ids.numel()])]).int()


def packed(document_ids: Tensor | Documents) -> tuple[Tensor, int]:
    """Return :func:`document_starts` and the tokens of the longest document."""
    if isinstance(document_ids, Documents):
        return document_ids.packed
    starts = document_starts(document_ids)
    return starts, int(starts.diff().max())
