"""Which keys a query attends to: causality and documents, of a whole sequence or of its shards.

B batch, T queries, S keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor


KEY_BLOCK = 32
"""Keys of a block of :func:`query_ranges_of`: the smallest that a kernel computes."""


class KeyRanges(NamedTuple):
    """Query ``i`` attends to the keys ``first[i] <= j < end[i]``: ``[1 or B, T]`` int32 each.

    Neither decreases along T, so the queries that attend to a block of keys are a range too. A
    sequence without documents has no tensors, which would cost the host more than the launch: there
    ``first`` is 0 and ``end`` is ``clip(i + offset, 0, S)``, computed by the kernel.
    """

    first: Tensor | None
    end: Tensor | None
    offset: int = 0
    query_ranges: Tensor | None = None
    """Those of :func:`query_ranges_of`, where they are computed once for many calls."""

    def tensors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``first`` and ``end`` as tensors, for kernels that read no offset."""
        if self.first is not None:
            return self.first, self.end
        i = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)[None]
        return torch.zeros_like(i), (i + self.offset).clamp(0, k.shape[1])


class Dropout(NamedTuple):
    """Probabilities are dropped with chance ``p``: see ``runtime/dropout.py``.

    ``q_positions [T]`` and ``k_positions [S]``, int32, are rows and columns of the whole sequence,
    and heads are numbered over the whole batch, so a shard drops what the whole would. None is the
    whole sequence, whose last query has the position of the last key.
    """

    p: float
    seed: Tensor
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None


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


def query_ranges_of(key_ranges: KeyRanges, num_keys: int) -> Tensor:
    """Find the queries that attend to every block of ``KEY_BLOCK`` keys: ``[1 or B, blocks, 4]``.

    Int32: the range of the queries that attend to any of its keys, and that of those that attend
    to all.
    """
    low = torch.arange(0, num_keys, KEY_BLOCK, dtype=torch.int32, device=key_ranges.first.device)
    high = (low + KEY_BLOCK).clamp(max=num_keys)
    edges = torch.cat([low + 1, high]).expand(key_ranges.first.shape[0], -1).contiguous()
    first, first_whole = torch.searchsorted(key_ranges.end, edges, out_int32=True).chunk(2, dim=1)
    end_whole, end = torch.searchsorted(key_ranges.first, edges, out_int32=True).chunk(2, dim=1)
    return torch.stack([first, end, first_whole, end_whole], dim=-1)


def document_starts(document_ids: Tensor) -> Tensor:
    """Return where every document starts in ``[B * T]``, and last ``B * T``: int32, same device.

    Other libraries take documents so. The host waits for their number.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = starts.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([document_ids.numel()])]).int()
