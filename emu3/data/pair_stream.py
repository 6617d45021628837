"""Batches of packed rows of preference pairs, as :mod:`emu3.data.stream` has those of documents.

``B`` rows of a rank, ``T`` tokens of a row, ``P`` pairs of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from emu3.config import Vocabulary
from emu3.data.order import drawn, key_of, permuted
from emu3.data.packing import Row, pack
from emu3.data.pairs import files_of_pairs, load_pairs
from emu3.data.stream import Place, StoreStream
from emu3.settings import Settings


class PairSettings(Settings):
    """The pairs, and what a row is made of."""

    pairs: Path
    """A file of ``emu3 prefer``, or its folder."""
    context: PositiveInt = 9216
    """Positions of the model that a row fills; it holds whole pairs."""
    batch_size: PositiveInt = 1
    """Rows of a step, of all ranks together."""
    window: PositiveInt = 4096
    """Pairs that are packed together, of one epoch at most."""
    workers: NonNegativeInt = 0
    """Processes that read ahead."""


@dataclass(frozen=True)
class _Window:
    """The pairs of a window, and its rows in the order of the stream."""

    pairs: np.ndarray
    rows: list[Row]


class PairRows(Dataset):
    """Packed rows by their place in the stream; every epoch takes each pair once."""

    def __init__(self, settings: PairSettings, vocabulary: Vocabulary, seed: int) -> None:
        self.settings, self.vocabulary, self.seed = settings, vocabulary, seed
        self.room = settings.context + 1
        self.folders = files_of_pairs(settings.pairs)
        self.files = [load_pairs(path) for path in self.folders]
        for path, pairs in zip(self.folders, self.files, strict=True):
            if pairs.header.vocabulary != vocabulary:
                raise ValueError(f"data: {path} must have the vocabulary of the model")
        lengths = torch.cat([pairs.lengths for pairs in self.files]).numpy()
        self._fitting = np.flatnonzero(lengths <= self.room)
        self._lengths = lengths
        self._starts = np.cumsum([0, *(len(pairs) for pairs in self.files)])
        self.left_out = len(lengths) - len(self._fitting)
        """Pairs that are longer than a row: they are never seen."""
        if not len(self._fitting):
            raise ValueError(
                f"data: no pair of {settings.pairs} fits a row of {self.room} tokens: the shortest "
                f"has {lengths.min()}"
            )
        self._window: tuple[int, _Window] | None = None

    @property
    def tokens(self) -> int:
        """Of all pairs that fit a row."""
        return int(self._lengths[self._fitting].sum())

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that depend on the codes and the reference."""
        kept = [(p.header, p.chosen, p.rejected, p.reference) for p in self.files]
        parts = [
            x.numpy().tobytes() if isinstance(x, Tensor) else repr(x) for of in kept for x in of
        ]
        return key_of(*parts) >> 1

    def window(self, number: int) -> _Window:
        """Return the rows of the next ``settings.window`` draws."""
        if self._window is None or self._window[0] != number:
            # Never more than an epoch: a row would hold a pair twice.
            size = min(self.settings.window, len(self._fitting))
            draws = np.arange(number * size, (number + 1) * size)
            pairs = self._fitting[drawn(draws, len(self._fitting), self.seed, "pairs")]
            rows = pack(self._lengths[pairs], np.zeros(size, bool), self.room, 0)
            order = permuted(np.arange(len(rows)), len(rows), key_of(self.seed, "rows", number))
            self._window = number, _Window(pairs, [rows[at] for at in order])
        return self._window[1]

    def __getitem__(self, places: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids int64, weights float32 and numbers of documents int32, ``[B, T]`` each, and
        log-probabilities of the reference ``[B, P, 2]`` float64.

        Document 2 p of a row is the chosen one of its pair p, 2 p + 1 the rejected one. Visual
        tokens weigh 1, all others 0. Padding is a document of its own. Without a reference its
        values are NaN, and without a pair too.
        """
        rows = [(self.window(window), row) for window, row in places]
        shape, most = (len(places), self.room), max(len(w.rows[row]) for w, row in rows)
        tokens = np.full(shape, self.vocabulary.pad, np.int64)
        documents = np.empty(shape, np.int32)
        reference = torch.full((len(places), most, 2), torch.nan, dtype=torch.float64)
        for number, (window, row) in enumerate(rows):
            at = 0
            for count, piece in enumerate(window.rows[row]):
                pairs, index = self._find(int(window.pairs[piece.document]))
                if pairs.reference is not None:
                    reference[number, count] = pairs.reference[index]
                for side, ids in enumerate(pairs.documents(index)):
                    tokens[number, at : at + len(ids)] = ids
                    documents[number, at : at + len(ids)] = 2 * count + side
                    at += len(ids)
            documents[number, at:] = 2 * len(window.rows[row])
        weights = (tokens >= self.vocabulary.visual_start).astype(np.float32)
        return *map(torch.from_numpy, (tokens, weights, documents)), reference

    def _find(self, number: int) -> tuple:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.files[file], number - int(self._starts[file])


class PairStream(StoreStream):
    """This rank's share of an endless stream of batches of pairs."""

    ROWS = PairRows
