"""Batches of packed rows from token stores: the same global stream for any ranks and workers.

``B`` rows of a rank, ``T`` tokens of a row: the context and one more, which is a target alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from emu3.config import Vocabulary
from emu3.data.order import Mixture, drawn, key_of, permuted, uniform
from emu3.data.packing import Row, pack
from emu3.data.store import Kind, Store
from emu3.settings import Settings

Place = tuple[int, int]
"""A window and one of its rows."""


class SourceSettings(Settings):
    """A store, and its share of the mixture."""

    store: Path
    weight: PositiveFloat | None = None
    """Share of the tokens, relative to the other sources; None for all: every document as often."""
    scores: Path | None = None
    """``.npy`` with a number for each document, in their order; those of NaN are never read."""
    better: float = Field(1.0, gt=0, le=1)
    """Share of the documents with a score that is read, those of the highest."""

    @model_validator(mode="after")
    def _has_scores(self) -> Self:
        if self.scores is None and self.better < 1:
            raise ValueError(f"better ({self.better}) needs scores")
        return self


class StreamSettings(Settings):
    """What a row is made of."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    context: PositiveInt = 5120
    """Positions of the model that a row fills."""
    batch_size: PositiveInt = 1
    """Rows of a step, of all ranks together."""
    window: PositiveInt = 4096
    """Documents that are packed together: 20 times as many as a row holds, at least."""
    cut_texts: bool = True
    """Cut texts where a row would end short, not only those longer than a row."""
    smallest_piece: PositiveInt = 128
    """Tokens of a piece of a text, at least."""
    describe: float = Field(0.5, ge=0, le=1)
    """Share of the pairs whose caption follows the image or clip."""
    null_caption: float = Field(0.05, ge=0, le=1)
    """Share of the images and clips to generate that come without their caption."""
    eos_after_vision: bool = True
    """End documents that end in an image or clip with EOS; the released fine-tuning does not."""
    learn: Literal["all", "answer"] = "all"
    """Of pairs and chats, learn every token, or only what follows the prompt."""
    vision_weight: NonNegativeFloat = 0.5
    """Loss weight of a visual token; a text token weighs ``text_weight``."""
    text_weight: NonNegativeFloat = 1.0
    workers: NonNegativeInt = 0
    """Processes that read ahead."""

    @model_validator(mode="after")
    def _pieces_fit(self) -> Self:
        if 2 * self.smallest_piece > self.context + 1:
            raise ValueError(
                f"smallest_piece ({self.smallest_piece}) must be at most half of a row of "
                f"context + 1 ({self.context + 1}) tokens"
            )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) != all(weighted):
            raise ValueError("sources must all have a weight, or none")
        return self


@dataclass(frozen=True)
class _Window:
    """The documents of a window, and its rows in the order of the stream."""

    sources: np.ndarray
    documents: np.ndarray
    behind: np.ndarray
    """Whether the caption stands behind the image or clip."""
    silent: np.ndarray
    """Whether the caption is left out."""
    rows: list[Row]


class Rows(Dataset):
    """Packed rows by their place in the stream; what a row holds depends on settings and seed."""

    def __init__(self, settings: StreamSettings, vocabulary: Vocabulary, seed: int) -> None:
        self.settings, self.vocabulary, self.seed = settings, vocabulary, seed
        self.stores = [Store(source.store) for source in settings.sources]
        self.room = settings.context + 1
        for store in self.stores:
            if store.vocabulary != vocabulary:
                raise ValueError(f"data: {store.folder} must have the vocabulary of the model")
        self.selections = [
            None if source.scores is None else _better(source, store)
            for source, store in zip(settings.sources, self.stores, strict=True)
        ]
        """Documents of each store that may be read; None is all."""
        fitting = [self._fitting(*of) for of in zip(self.stores, self.selections, strict=True)]
        self.tokens = sum(tokens for _, tokens, _ in fitting)
        """Of all documents that are read."""
        self.left_out = sum(left_out for _, _, left_out in fitting)
        """Documents that are no text and longer than a row: they are never seen."""
        for store, (documents, _, _) in zip(self.stores, fitting, strict=True):
            if not documents:
                raise ValueError(
                    f"data: no document of {store.folder} fits a row of {self.room} tokens"
                )
        rates = [
            count if source.weight is None else source.weight * count / tokens
            for source, count, (_, tokens, _) in zip(
                settings.sources, self._counts, fitting, strict=True
            )
        ]
        self._mixture = Mixture(rates, settings.window)
        self.window = lru_cache(maxsize=4)(self._window)

    @property
    def folders(self) -> list[Path]:
        """The stores, to name them."""
        return [store.folder for store in self.stores]

    @property
    def fingerprint(self) -> int:
        """63 bits that depend on what the stores hold."""
        chosen = [array.tobytes() for array in self.selections if array is not None]
        return key_of(*(store.fingerprint for store in self.stores), *chosen) >> 1

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "window"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.window = lru_cache(maxsize=4)(self._window)

    def __getitem__(self, places: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64, weights float32 and ids of the documents int32, ``[B, T]`` each.

        The first token of a document and the padding at the end of a row weigh 0. Padding is a
        document of its own.
        """
        shape = len(places), self.room
        tokens = np.full(shape, self.vocabulary.pad, np.int64)
        learned, documents = np.zeros(shape, bool), np.empty(shape, np.int32)
        for number, (window, row) in enumerate(places):
            found = self.window(window)
            at = 0
            for count, piece in enumerate(found.rows[row]):
                ids, mask = self._arranged(found, piece.document)
                stop = at + piece.length
                tokens[number, at:stop] = ids[piece.start : piece.stop]
                learned[number, at:stop] = mask[piece.start : piece.stop]
                learned[number, at] = False
                documents[number, at:stop] = count
                at = stop
            documents[number, at:] = len(found.rows[row])
        s = self.settings
        is_visual = tokens >= self.vocabulary.visual_start
        weights = np.where(is_visual, np.float32(s.vision_weight), np.float32(s.text_weight))
        arrays = tokens, np.where(learned, weights, np.float32(0)), documents
        return tuple(map(torch.from_numpy, arrays))

    @property
    def _counts(self) -> list[int]:
        """Documents of each source."""
        both = zip(self.stores, self.selections, strict=True)
        return [len(store if chosen is None else chosen) for store, chosen in both]

    def _fitting(self, store: Store, chosen: np.ndarray | None) -> tuple[int, int, int]:
        """Documents that are drawn, their tokens, and documents that are too long."""
        documents = tokens = 0
        for start, shard in zip(store.starts, store.shards, strict=False):
            mine = slice(None)
            if chosen is not None:
                mine = chosen[(chosen >= start) & (chosen < start + len(shard))] - start
            lengths = np.asarray(shard.lengths, np.int64)[mine]
            fits = (lengths <= self.room) | (shard.kinds[mine] == Kind.TEXT)
            documents += int(fits.sum())
            tokens += int(lengths[fits].sum())
        return documents, tokens, len(store if chosen is None else chosen) - documents

    def _window(self, number: int) -> _Window:
        s = self.settings
        parts = [self._draws(source, number) for source in range(len(self.stores))]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        sources, documents, lengths, kinds, behind, silent = columns
        smallest = s.smallest_piece if s.cut_texts else 0
        rows = pack(lengths, kinds == Kind.TEXT, self.room, smallest)
        key = key_of(self.seed, "rows", number)
        order = permuted(np.arange(len(rows)), len(rows), key) if rows else ()
        return _Window(sources, documents, behind, silent, [rows[at] for at in order])

    def _draws(self, source: int, window: int) -> tuple[np.ndarray, ...]:
        s, store = self.settings, self.stores[source]
        draws = self._mixture.draws(source, window)
        documents = drawn(draws, self._counts[source], self.seed, source)
        if (chosen := self.selections[source]) is not None:
            documents = chosen[documents]
        lengths, kinds, captions = store.columns(documents)
        is_captioned = (kinds == Kind.PAIR) & (captions > 0)
        behind = is_captioned & (uniform(draws, key_of(self.seed, source, "order")) < s.describe)
        chance = uniform(draws, key_of(self.seed, source, "caption"))
        silent = is_captioned & ~behind & (chance < s.null_caption)
        lengths -= np.where(silent, captions, 0)
        if not s.eos_after_vision:
            lengths -= (kinds == Kind.PAIR) & ~behind
        return np.full(len(draws), source), documents, lengths, kinds, behind, silent

    def _arranged(self, window: _Window, at: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a document as it stands in its row, and which of them are learned."""
        shard, number = self.stores[window.sources[at]].find(int(window.documents[at]))
        ids, kind = shard.ids(number), shard.kinds[number]
        caption, start = 1 + int(shard.captions[number]), 0
        is_answer = self.settings.learn == "answer"
        if kind == Kind.PAIR:
            if window.behind[at]:
                ids = np.concatenate((ids[:1], ids[caption:-1], ids[1:caption], ids[-1:]))
                start = len(ids) - caption
            else:
                ids = np.concatenate((ids[:1], ids[caption:])) if window.silent[at] else ids
                ids = ids if self.settings.eos_after_vision else ids[:-1]
                start = int((ids == self.vocabulary.img_token).argmax()) + 1
        learned = np.ones(len(ids), bool)
        if is_answer:
            learned[:start] = False
            if kind == Kind.CHAT:
                learned[:] = False
                for first, end in shard.answers(number):
                    learned[first:end] = True
        return ids, learned


class StoreStream:
    """This rank's share of an endless stream of batches.

    A step takes the next ``batch_size`` rows of one global stream, and a rank every ``ranks``-th
    ``micro_batch_size`` of them. The state is the place of the next row: it is the same on all
    ranks, and a stream of any other number of ranks or workers can be restored from it.

    Args:
        vocabulary: of the model.
        seed: of order, packing and captions.

    Raises:
        ValueError: one line, if a store is damaged, has another vocabulary or nothing that fits.
    """

    ROWS: Callable[..., Dataset] = Rows
    """What is read: other streams set another."""

    def __init__(
        self,
        settings: StreamSettings,
        vocabulary: Vocabulary,
        seed: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        micro_batch_size: int = 1,
    ) -> None:
        if settings.batch_size % (ranks * micro_batch_size):
            raise ValueError(
                f"data.batch_size ({settings.batch_size}) must be a multiple of {ranks} ranks"
                + (f" x {micro_batch_size} rows at once" if micro_batch_size > 1 else "")
            )
        self.settings = settings
        groups = range(rank, settings.batch_size // micro_batch_size, ranks)
        self._own = [n * micro_batch_size + i for n in groups for i in range(micro_batch_size)]
        self.rows = self.ROWS(settings, vocabulary, seed)
        self._next: Place = (0, 0)
        self._batches: Iterator | None = None

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64, weights float32 and ids of the documents int32, ``[B, T]`` each."""
        if self._batches is None:
            steps = _Steps(self.rows, self._next, self.settings.batch_size, self._own)
            self._batches = iter(
                DataLoader(
                    _Placed(self.rows),
                    sampler=steps,
                    batch_size=None,
                    collate_fn=_as_it_is,
                    # Its own: a loader that starts would draw from the random numbers of the run.
                    generator=torch.Generator(),
                    num_workers=self.settings.workers,
                )
            )
        self._next, batch = next(self._batches)
        return batch

    def state(self) -> dict[str, Tensor]:
        window, row = self._next
        place = {"window": window, "row": row, "stores": self.rows.fingerprint}
        return {name: torch.tensor(value) for name, value in place.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: one line, if a store has changed: other rows would follow.
        """
        if int(state["stores"]) != self.rows.fingerprint:
            folders = ", ".join(map(str, self.rows.folders))
            raise ValueError(
                f"data: {folders}: a store has changed since this run was saved; restore its shards"
            )
        self._next, self._batches = (int(state["window"]), int(state["row"])), None


def _better(source: SourceSettings, store: Store) -> np.ndarray:
    """The documents of the highest scores, in their order."""
    try:
        scores = np.load(source.scores, allow_pickle=False)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"data: {source.scores} is no .npy file of scores: {line}") from None
    if scores.shape != (len(store),) or scores.dtype.kind not in "fiu":
        raise ValueError(
            f"data: {source.scores} must have a number for each of the {len(store)} documents of "
            f"{store.folder}, got {scores.dtype} {scores.shape}"
        )
    scored = np.flatnonzero(~np.isnan(scores))
    order = scored[np.argsort(-scores[scored].astype(np.float64), kind="stable")]
    if not len(order):
        raise ValueError(f"data: {source.scores} has no score but NaN")
    return np.sort(order[: max(1, round(source.better * len(order)))])


def _as_it_is(batch: tuple) -> tuple:
    """The loader's own conversion would make lists of tuples."""
    return batch


@dataclass(frozen=True)
class _Steps:
    """For each step, the place after it and the places of this rank's rows."""

    rows: Rows
    start: Place
    batch_size: int
    own: list[int]

    def __iter__(self) -> Iterator[tuple[Place, list[Place]]]:
        window, row = self.start
        while True:
            taken: list[Place] = []
            while len(taken) < self.batch_size:
                if row >= len(self.rows.window(window).rows):
                    window, row = window + 1, 0
                    continue
                taken.append((window, row))
                row += 1
            yield (window, row), [taken[number] for number in self.own]


class _Placed(Dataset):
    """Batches, each with the place after it: workers read ahead of what was taken."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, step: tuple[Place, list[Place]]) -> tuple:
        after, places = step
        return after, self.rows[places]
