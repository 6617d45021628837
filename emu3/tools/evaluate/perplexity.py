"""Perplexity of the documents of a token store, by modality."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from emu3.config import Vocabulary
from emu3.data.store import Kind, Store
from emu3.text import TextTokenizer
from emu3.tools.evaluate.lines import watched
from emu3.weights import Pretrained
from emu3_kernels.modules import QuantizedLinear

_TOKENS = 16384
"""Of a forward, about."""


class Modality(IntEnum):
    """What a token belongs to."""

    TEXT = 0
    IMAGE = 1
    """A code of an image."""
    VIDEO = 2
    """A code of a clip."""
    STRUCTURE = 3
    """Around codes: from boi to img_token, EOL, EOF and eoi; and EOS."""


@dataclass
class Perplexity:
    """Sums of losses in nats, and counts, of the tokens of each modality."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(Modality), dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(len(Modality), dtype=torch.int64))
    documents: int = 0
    left_out: int = 0
    """Documents that are no text and longer than the model's context."""

    def report(self) -> dict:
        found = {
            part.name.lower(): _of(float(self.sums[part]), int(self.counts[part]))
            for part in Modality
            if self.counts[part]
        }
        found["all"] = _of(float(self.sums.sum()), int(self.counts.sum()))
        return {**found, "documents": self.documents, "left_out": self.left_out}


def _of(total: float, count: int) -> dict:
    """A loss beyond float64's exponent, of a model that diverged, has no perplexity."""
    loss = total / count
    return {
        "perplexity": math.exp(loss) if loss < 700 else None,
        "loss": loss,
        "tokens": count,
    }


@torch.inference_mode()
def measure_perplexity(
    loaded: Pretrained, store: Store, documents: int | None = None
) -> Perplexity:
    """``exp`` of the mean loss in nats of each token given all tokens before it in its document.

    The first token of a document is given. Documents are read as they are stored: captions before
    images. A text longer than the context is cut there; any other is left out.

    Args:
        loaded: the model.
        store: of its vocabulary.
        documents: how many are read, evenly spread over the store; None reads all.

    Raises:
        ValueError: one line, if the store has another vocabulary, or no document fits.
    """
    vocabulary = loaded.model.settings.vocabulary
    if isinstance(loaded.model.head, QuantizedLinear):
        raise ValueError("evaluate: perplexity needs a decoder that is not quantized")
    if store.vocabulary != vocabulary:
        raise ValueError(f"evaluate: {store.folder} must have the vocabulary of the model")
    found = Perplexity()
    room = loaded.model.settings.max_position_embeddings + 1
    chosen = _chosen(store, documents, room, found)
    if not len(chosen):
        raise ValueError(f"evaluate: no document of {store.folder} fits {room} tokens")
    for part in watched(list(_groups(store, chosen, room)), "perplexity"):
        rows = [_ids(store, number, room) for number in part]
        for row, losses in zip(rows, _losses(loaded, rows), strict=True):
            kinds = torch.from_numpy(modalities(row, loaded.text))[1:]
            found.sums.index_add_(0, kinds, losses.double())
            found.counts += torch.bincount(kinds, minlength=len(Modality))
            found.documents += 1
    return found


def _chosen(store: Store, documents: int | None, room: int, found: Perplexity) -> np.ndarray:
    count = len(store) if documents is None else min(documents, len(store))
    numbers = np.arange(count) * len(store) // count
    lengths, kinds, _ = store.columns(numbers)
    fits = (lengths > 1) & ((lengths <= room) | (kinds == Kind.TEXT))
    found.left_out = int((~fits).sum())
    return numbers[fits]


def _groups(store: Store, numbers: np.ndarray, room: int) -> Iterator[Sequence[int]]:
    """Documents of similar lengths together: the padding of a forward costs as much as its rest."""
    lengths = np.minimum(store.columns(numbers)[0], room)
    group: list[int] = []
    for at in np.argsort(lengths, kind="stable"):
        if group and (len(group) + 1) * int(lengths[at]) > _TOKENS:
            yield group
            group = []
        group.append(int(numbers[at]))
    yield group


def _ids(store: Store, document: int, room: int) -> np.ndarray:
    shard, number = store.find(document)
    return shard.ids(number)[:room].astype(np.int64)


def _losses(loaded: Pretrained, rows: Sequence[np.ndarray]) -> list[Tensor]:
    """Losses in nats ``[n - 1]`` of the tokens of each document, but the first, on the CPU."""
    model, longest = loaded.model, max(map(len, rows))
    tokens = torch.full((len(rows), longest), loaded.text.vocabulary.pad)
    weights = torch.zeros(len(rows), longest)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.from_numpy(row)
        weights[number, 1 : len(row)] = 1
    tokens, weights = (of.to(model.embedding.weight.device) for of in (tokens, weights))
    _, losses = model.objective(tokens[:, :-1], tokens[:, 1:], weights[:, 1:], return_losses=True)
    return [of[: len(row) - 1].float().cpu() for of, row in zip(losses, rows, strict=True)]


def modalities(ids: np.ndarray, text: TextTokenizer) -> np.ndarray:
    """The :class:`Modality` ``[n]`` int64 of each token of a document."""
    names: Vocabulary = text.vocabulary
    found = np.full(len(ids), Modality.STRUCTURE, np.int64)
    found[ids < names.num_text] = Modality.TEXT
    found[ids >= names.visual_start] = Modality.IMAGE
    begins, ends = (np.flatnonzero(ids == of) for of in (names.boi, names.eoi))
    for begin in begins:
        behind = ends[ends > begin]
        end = int(behind[0]) + 1 if len(behind) else len(ids)
        head = begin + int((ids[begin:end] == names.img_token).argmax())
        found[begin:head] = Modality.STRUCTURE
        if "fps" in text.decode(ids[begin + 1 : head].tolist()):
            inside = found[head:end]
            inside[inside == Modality.IMAGE] = Modality.VIDEO
    return found
