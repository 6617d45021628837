"""Which keys a query sees. Causality and documents, of a whole sequence or of shards, are spans."""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Query ``i`` sees the keys ``first[i] <= j < end[i]``: ``[1 or B, T]`` int32 each.

    Neither ever decreases along T, so the queries that see a block of keys are a span too.
    """

    first: Tensor
    end: Tensor


class Dropout(NamedTuple):
    """Probabilities dropped with chance ``p``: see ``dropout.py``.

    Rows ``[T]`` and columns ``[S]`` int32 are positions in the whole sequence, and the head
    counts through the batch, so that a shard drops what the whole would.
    """

    p: float
    seed: Tensor
    rows: Tensor
    columns: Tensor


def spans_of(
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor | None = None,
    k_documents: Tensor | None = None,
    *,
    causal: bool,
) -> Spans:
    """Find the span of every query: keys at its position or before (causal), of its document.

    Args:
        q_positions: ``[T]``, ascending.
        k_positions: ``[S]``, ascending.
        q_documents: ``[B, T]``, non-decreasing along T; None is one document.
        k_documents: ``[B, S]`` likewise.
        causal: whether a key after the query is hidden.
    """
    if causal:
        end = torch.searchsorted(k_positions, q_positions, right=True, out_int32=True)[None]
    else:
        end = torch.full_like(q_positions, len(k_positions), dtype=torch.int32)[None]
    if q_documents is None:
        return Spans(torch.zeros_like(end), end)
    documents = k_documents.contiguous(), q_documents.contiguous()
    first = torch.searchsorted(*documents, out_int32=True)
    last = torch.searchsorted(*documents, right=True, out_int32=True)
    return Spans(first, torch.minimum(last, end))
