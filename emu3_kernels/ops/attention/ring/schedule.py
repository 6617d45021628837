"""Which tokens travel when, from whom to whom: pure functions of sizes and documents.

At hop h rank r reads the keys of rank r-h, in pieces; only what it sees is sent, by its owner
itself, so every rank has the same part of every hop and no token passes through a third.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from emu3_kernels.ops.attention.ring.shards import Zigzag

MIN_PIECE = 512
"""Tokens below which a shard is not cut: messages and kernels of less are mostly latency."""


class Edges(NamedTuple):
    """The documents at both ends of a chunk, and how many of its tokens are theirs."""

    first: int
    head: int
    last: int
    tail: int


class Transfer(NamedTuple):
    """What a rank reads of another's keys in a step, and its own queries that see them.

    Ranges of indices in the owner's and in the reader's shard, ascending and apart; no keys,
    no message. Queries are at most one range a chunk.
    """

    keys: tuple[range, ...]
    queries: tuple[range, ...]

    @property
    def num_keys(self) -> int:
        return sum(map(len, self.keys))


class Schedule(NamedTuple):
    """All transfers of a ring: ``edges`` ``[2P][B]`` of the chunks; None is one document."""

    zigzag: Zigzag
    causal: bool
    edges: list[list[Edges]] | None

    def num_pieces(self, most: int) -> int:
        return max(1, min(most, self.zigzag.num_tokens // self.zigzag.world // MIN_PIECE))

    def steps(self, most_pieces: int) -> Iterator[tuple[int, int, int]]:
        """Yield (hop, piece, pieces), the same on every rank: what is sent depends on the rank.

        Messages of a step cannot overtake those of another, whoever takes part in it.
        """
        pieces = self.num_pieces(most_pieces)
        for hop in range(1, self.zigzag.world):
            for piece in range(pieces):
                yield hop, piece, pieces

    def transfer(self, owner: int, reader: int, piece: int = 0, pieces: int = 1) -> Transfer:
        """Return what ``reader`` needs of a piece of the shard of ``owner``, perhaps its own."""
        size = self.zigzag.size(owner)
        cell = range(size * piece // pieces, size * (piece + 1) // pieces)
        keys, queries = [], []
        for d in self.zigzag.chunks_of(reader):
            rows = []
            for c in self.zigzag.chunks_of(owner):
                met_keys, met_queries = self.meeting(c, d)
                seen = _overlap(self.zigzag.local(c, met_keys), cell)
                if seen and met_queries:
                    keys.append(seen)
                    rows.append(self.zigzag.local(d, met_queries))
            if rows:
                queries.append(range(min(r.start for r in rows), max(r.stop for r in rows)))
        return Transfer(_union(keys), tuple(queries))

    def meeting(self, c: int, d: int) -> tuple[range, range]:
        """Return the keys of chunk ``c`` that are seen from chunk ``d``, and the queries that do.

        Documents are contiguous: of two chunks, only one that fills all between them is in both.
        """
        keys, queries = self.zigzag.chunk(c), self.zigzag.chunk(d)
        if self.causal and c > d:
            return range(0), range(0)
        if self.edges is None or c == d or not keys or not queries:
            return keys, queries
        pairs = list(zip(self.edges[c], self.edges[d], strict=True))
        if c < d:
            met = [(k.tail, q.head) for k, q in pairs if k.last == q.first]
            tail, head = (max(lengths) for lengths in zip(*met, strict=True)) if met else (0, 0)
            return keys[len(keys) - tail :], queries[:head]
        met = [(k.head, q.tail) for k, q in pairs if k.first == q.last]
        head, tail = (max(lengths) for lengths in zip(*met, strict=True)) if met else (0, 0)
        return keys[:head], queries[len(queries) - tail :]

    def num_sent(self, rank: int) -> int:
        """Count the tokens whose k and v ``rank`` sends, once for each reader.

        Backward they travel again, and their dk and dv in float32 the other way.
        """
        others = (reader for reader in range(self.zigzag.world) if reader != rank)
        return sum(self.transfer(rank, reader).num_keys for reader in others)

    def num_received(self, rank: int) -> int:
        others = (owner for owner in range(self.zigzag.world) if owner != rank)
        return sum(self.transfer(owner, rank).num_keys for owner in others)


def ring_schedule(
    num_tokens: int, world: int, *, causal: bool = True, document_ids: Tensor | None = None
) -> Schedule:
    """Plan who sends what to whom.

    Args:
        num_tokens: T, of the whole sequence.
        world: P, the number of ranks.
        causal: whether later keys are hidden.
        document_ids: ``[B, T]`` of the whole sequence, on the CPU.
    """
    zigzag = Zigzag(num_tokens, world)
    edges = None
    if document_ids is not None:
        edges = [_edges(document_ids, zigzag.chunk(c)) for c in range(2 * world)]
    return Schedule(zigzag, causal, edges)


def _edges(document_ids: Tensor, chunk: range) -> list[Edges]:
    if not chunk:
        return []
    ids = document_ids[:, chunk.start : chunk.stop]
    first, last = ids[:, :1], ids[:, -1:]
    rows = zip(
        first[:, 0].tolist(),
        (ids == first).sum(1).tolist(),
        last[:, 0].tolist(),
        (ids == last).sum(1).tolist(),
        strict=True,
    )
    return [Edges(*row) for row in rows]


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _union(ranges: list[range]) -> tuple[range, ...]:
    """Join ranges that touch or overlap."""
    joined: list[range] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if joined and part.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, part.stop))
        else:
            joined.append(part)
    return tuple(joined)
