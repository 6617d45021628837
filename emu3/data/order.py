"""The order of endless draws from several sources, as a pure function of (seed, place).

Nothing is stored: a document's place in an epoch is a permutation computed by a Feistel cipher, and
the number of draws from a source before any place has a closed form.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 4


def key_of(*what: object) -> int:
    """64 bits that depend on every one of ``what``."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def scattered(values: np.ndarray, key: int) -> np.ndarray:
    """64 random bits for each of ``values``, uint64: SplitMix64's finaliser."""
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(values: np.ndarray, key: int) -> np.ndarray:
    """A random number in [0, 1) for each of ``values``, float64."""
    return (scattered(values, key) >> np.uint64(11)) * 2.0**-53


def permuted(values: np.ndarray, count: int, key: int) -> np.ndarray:
    """The image of ``values`` under a bijection of [0, count).

    A Feistel cipher over the next power of four, walked along its cycles until it is inside.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    out = values.astype(np.uint64)
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> shift, out[todo] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (scattered(right, key_of(key, number)) & mask)
        out[todo] = (left << shift) | right
        todo = out >= count
    return out.astype(np.int64)


class Mixture:
    """Which draws from which source fall into a window of about ``window`` draws.

    The draws from a source before window ``w`` are ``floor(w * window * rate)``: each window has
    every source's share, to a draw.
    """

    def __init__(self, rates: Sequence[float], window: int) -> None:
        # Integers: the same on every machine, for any number of draws.
        total = sum(rates)
        self._draws = [round(window * rate / total * 2**32) for rate in rates]

    def draws(self, source: int, window: int) -> np.ndarray:
        """The numbers of the draws from ``source`` in ``window``, int64."""
        start, stop = (number * self._draws[source] >> 32 for number in (window, window + 1))
        return np.arange(start, stop)


def drawn(draws: np.ndarray, count: int, *seed: object) -> np.ndarray:
    """The document of each of the ``draws`` from ``count``: every epoch all of them, shuffled."""
    documents, epochs = np.empty_like(draws), draws // count
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        documents[mine] = permuted(draws[mine] % count, count, key_of(*seed, int(epoch)))
    return documents
