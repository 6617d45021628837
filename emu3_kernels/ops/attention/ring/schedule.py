"""Which tokens are sent when, by which rank to which: pure functions of sizes and documents.

At hop h rank r reads the keys of rank r-h, in pieces. Their owner itself sends only keys to which r
attends, so every rank has the same part of every hop and no token passes through a third.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from emu3_kernels.ops.attention.ring.shards import Zigzag

MIN_PIECE = 512
"""Tokens below which a shard is not split: smaller messages and launches are mostly latency."""


class Edges(NamedTuple):
    """The documents at both ends of a chunk, and the numbers of their tokens in it."""

    first: int
    head: int
    last: int
    tail: int


class Transfer(NamedTuple):
    """What a rank reads of another's keys in a step, and its own queries that attend to them.

    Ranges of indices in the owner's and in the reader's shard, ascending and disjoint; without keys
    there is no message. Queries are at most one range a chunk.
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

    def num_pieces(self, max_pieces: int) -> int:
        return max(1, min(max_pieces, self.zigzag.num_tokens // self.zigzag.world // MIN_PIECE))

    def steps(self, max_pieces: int) -> Iterator[tuple[int, int, int]]:
        """Yield (hop, piece, pieces), the same on every rank; what is sent depends on the rank.

        So messages of a step cannot overtake those of another.
        """
        pieces = self.num_pieces(max_pieces)
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
                attended = _overlap(self.zigzag.local(c, met_keys), cell)
                if attended and met_queries:
                    keys.append(attended)
                    rows.append(self.zigzag.local(d, met_queries))
            if rows:
                queries.append(range(min(r.start for r in rows), max(r.stop for r in rows)))
        return Transfer(_union(keys), tuple(queries))

    def meeting(self, c: int, d: int) -> tuple[range, range]:
        """Return the keys of chunk ``c`` to which chunk ``d`` attends, and its queries that do.

        Documents are contiguous: two chunks share one only if it fills everything between them.
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

        Backward they are sent again, and their dk and dv return in float32.
        """
        others = (reader for reader in range(self.zigzag.world) if reader != rank)
        return sum(self.transfer(rank, reader).num_keys for reader in others)

    def num_received(self, rank: int) -> int:
        others = (owner for owner in range(self.zigzag.world) if owner != rank)
        return sum(self.transfer(owner, rank).num_keys for owner in others)


def ring_schedule(
    num_tokens: int, world: int, *, causal: bool = True, document_ids: Tensor | None = None
) -> Schedule:
    """Plan the transfers of a ring.

    Args:
        num_tokens: T, of the whole sequence.
        world: P, the number of ranks.
        causal: whether later keys are masked.
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
