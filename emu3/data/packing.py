"""Rows of a fixed length, filled with whole documents and, where a row ends, with cut texts."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

_SPARE = 500
"""Rows of which one may be empty before texts are cut: 99.8 % full is enough."""


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


Row = list[Piece]


def pack(lengths: np.ndarray, is_text: np.ndarray, room: int, smallest: int) -> list[Row]:
    """Fill rows of ``room`` tokens with documents; which, depends on the arguments alone.

    Best fit in falling order of length. Where that leaves more than a row in ``_SPARE`` empty,
    texts are cut so that they fill the rows of the other documents to the end, if this takes fewer
    rows. A text longer than a row is cut in any case; another document that is longer is left out.

    Args:
        lengths: int64 ``[n]``.
        is_text: bool ``[n]``: documents that may be cut.
        smallest: tokens of a piece of a text, at least; at most half of ``room``. 0 cuts only
            texts longer than a row.

    Returns:
        Rows of pieces; every token of a document that is not left out is in one.
    """
    pieces = [
        Piece(document, 0, length)
        for document, length in enumerate(lengths.tolist())
        if length <= room or is_text[document]
    ]
    rows, rest = _cut(pieces, room, max(1, smallest))
    best = rows + _best_fit(rest, room, [])
    least = -(-sum(piece.length for piece in pieces) // room)
    if smallest and len(best) - least > least / _SPARE:
        others = _best_fit([p for p in pieces if not is_text[p.document]], room, [])
        texts = _fill(others, [p for p in pieces if is_text[p.document]], room, smallest)
        rows, rest = _cut(texts, room, smallest)
        best = min(best, rows + _best_fit(rest, room, others), key=len)
    return best


def _cut(pieces: Row, room: int, smallest: int) -> tuple[list[Row], Row]:
    """Rows of the first parts of what is longer than a row, and all that is left to be packed."""
    rows, rest = [], []
    for document, start, end in pieces:
        while end - start > room:
            # What is left must be as long as a piece.
            stop = min(start + room, end - smallest)
            part = Piece(document, start, stop)
            if part.length == room:
                rows.append([part])
            else:
                rest.append(part)
            start = stop
        rest.append(Piece(document, start, end))
    return rows, rest


def _best_fit(pieces: Row, room: int, rows: list[Row]) -> list[Row]:
    """``rows`` and new ones, with every piece in the row whose end it fits best."""
    free = sorted((room - sum(p.length for p in row), at) for at, row in enumerate(rows))
    for piece in sorted(pieces, key=lambda piece: (piece.start - piece.stop, piece)):
        at = bisect_left(free, (piece.length,))
        if at == len(free):
            space, row = room, len(rows)
            rows.append([])
        else:
            space, row = free.pop(at)
        rows[row].append(piece)
        if space > piece.length:
            insort(free, (space - piece.length, row))
    return rows


def _fill(rows: list[Row], texts: Row, room: int, smallest: int) -> Row:
    """Fill the ends of ``rows`` with ``texts``, whole or cut; return those left over."""
    pool = sorted((text.length, text) for text in texts)
    for row in sorted(rows, key=lambda row: sum(piece.length for piece in row)):
        space = room - sum(piece.length for piece in row)
        while space >= smallest and pool:
            at = bisect_left(pool, (space + 1,)) - 1
            left = space - pool[at][0] if at >= 0 else space
            length, text = pool[-1]
            if (smallest // 8 < left < smallest and length >= space + smallest) or at < 0:
                if length < space + smallest:
                    break
                # No text ends near the end of the row: the longest is cut there.
                pool.pop()
                middle = text.start + space
                insort(pool, (text.stop - middle, text._replace(start=middle)))
                text = text._replace(stop=middle)
            else:
                length, text = pool.pop(at)
            row.append(text)
            space -= text.length
    return [text for _, text in pool]
