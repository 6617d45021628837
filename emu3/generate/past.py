"""Keys and values of a conversation so far, for a prompt that goes on from it."""

from collections.abc import Sequence
from itertools import takewhile

from emu3.cache import KeyValueCache


class Past:
    """The last sequence of one row: a prompt that begins as it does is fed from there on."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: KeyValueCache | None = None

    def fill(self, cache: KeyValueCache, prompt: Sequence[int]) -> int:
        """Copy what ``prompt`` shares with the sequence to row 0 of an empty ``cache``.

        Returns:
            Its length; the last token of the prompt, whose logits are needed, is not in it.
        """
        pairs = zip(self._ids, prompt[:-1], strict=False)
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
        if shared:
            cache.keys[:, 0, :shared] = self._cache.keys[:, 0, :shared]
            cache.values[:, 0, :shared] = self._cache.values[:, 0, :shared]
            cache.lengths.fill_(shared)
        cache.longest = shared
        return shared

    def keep(self, ids: Sequence[int], cache: KeyValueCache) -> None:
        """Remember ``ids``, all of which are in row 0 of ``cache``."""
        self._ids, self._cache = list(ids), cache
