"""Rows of scores to decisions: ranges of scores, then near-duplicates."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from emu3.tools.curate.settings import CurateSettings, Filters, Range

Row = dict[str, Any]

KINDS = "image", "clip"
SCORES = "width", "height", "short_edge", "aspect", "seconds", "fps", "luma", "text", "flow"
DAMAGE = "sharpness", "colourfulness"
_BITS = 64


def check_filters(settings: CurateSettings, voters: Sequence[str] = ()) -> None:
    """Refuse ranges of scores that are neither measured nor those of voters.

    Raises:
        ValueError: one line.
    """
    for name in ("images", "videos"):
        _check(name, getattr(settings, name), (*SCORES, *DAMAGE, *voters))


def decide(rows: Sequence[Row], settings: CurateSettings) -> None:
    """Set ``keep``, ``reasons`` and ``duplicate_of`` of every row.

    A row is kept if each score that a range is set for is measured and in it, and if no better row
    that is kept shows the same. Of duplicates the one with the most pixels is kept, and of equals
    the first.
    """
    for row in rows:
        filters = settings.filters(row["kind"])
        row["reasons"] = ["unreadable"] if row["error"] else list(_reasons(row, filters))
        row["duplicate_of"] = None
    if settings.duplicates >= 0:
        for kind in KINDS:
            passed = [row for row in rows if row["kind"] == kind and not row["reasons"]]
            _mark_duplicates(passed, settings.duplicates)
    for row in rows:
        row["keep"] = not row["reasons"]


def _check(where: str, filters: Filters, known: Sequence[str]) -> None:
    for name, allowed in filters.items():
        if name not in known:
            raise ValueError(f"curate: {where}.{name}: unknown score; there are {', '.join(known)}")
        _check(f"{where}.{name}.unless", allowed.unless, known)


def _reasons(row: Row, filters: Filters) -> Iterator[str]:
    for name, allowed in filters.items():
        reason = outside(name, row.get(name), allowed)
        excused = allowed.unless and not any(_reasons(row, allowed.unless))
        if reason and not excused:
            yield reason


def outside(name: str, value: float | None, allowed: Range) -> str | None:
    """Why a score is out of its range, as ``text 0.13 > 0.05``, or None."""
    if value is None:
        return f"{name} is not measured"
    if allowed.min is not None and value < allowed.min:
        return f"{name} {value:.4g} < {allowed.min:g}"
    if allowed.max is not None and value > allowed.max:
        return f"{name} {value:.4g} > {allowed.max:g}"
    return None


def _mark_duplicates(rows: Sequence[Row], most: int) -> None:
    order = sorted(rows, key=lambda row: -row["width"] * row["height"])
    hashes = [_words(row["hash"]) for row in order]
    for worse, better in duplicates_of(np.array(hashes, np.uint64), most).items():
        kept = order[better]["id"]
        order[worse]["duplicate_of"] = kept
        order[worse]["reasons"] = [f"shows the same as {kept}"]


def _words(digits: str) -> list[int]:
    return [int(digits[at : at + 16], 16) for at in range(0, len(digits), 16)]


def duplicates_of(hashes: np.ndarray, most: int) -> dict[int, int]:
    """For each row that is near an earlier one that is kept, that one: greedily, in their order.

    Of ``most + 1`` bands of bits one at least is equal if ``most`` bits differ, so that only rows
    with an equal band are compared.

    Args:
        hashes: ``[N, K]`` uint64; each of the K must be near.
    """
    if not len(hashes):
        return {}
    firsts, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)[1:]
    order = np.argsort(firsts)
    distinct = hashes[firsts[order]]
    edges = np.linspace(0, _BITS, most + 2).astype(int)
    pairs: set[tuple[int, int]] = set()
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        pairs.update(_within_band(distinct, distinct[:, 0] >> np.uint64(low) & mask, most))
    owner = np.arange(len(distinct))
    for better, worse in sorted(pairs):
        if owner[better] == better and owner[worse] == worse:
            owner[worse] = better
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    kept = firsts[order][owner[place[inverse.ravel()]]]
    return {row: int(one) for row, one in enumerate(kept) if row != one}


def _within_band(distinct: np.ndarray, band: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.diff(band[order])) + 1
    for group in np.split(order, starts):
        # A stable sort keeps the rows of a band in their order.
        for position, one in enumerate(group[:-1].tolist()):
            others = group[position + 1 :]
            apart = _bits(distinct[others] ^ distinct[one]).max(axis=1)
            yield from ((one, other) for other in others[apart <= most].tolist())


def _bits(values: np.ndarray) -> np.ndarray:
    """How many bits of each are set; ``np.bitwise_count`` came with NumPy 2."""
    octets = np.ascontiguousarray(values)[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1).sum(axis=-1)
