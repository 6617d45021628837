"""Token stores of random documents, made in milliseconds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from emu3.config import BYTE_VOCABULARY
from emu3.data.codes import Making
from emu3.data.store import Document, Kind, Provenance, Store, write_shard
from emu3.prompt import image_ids
from emu3.text import ByteTokenizer

IDS = BYTE_VOCABULARY
TEXT = ByteTokenizer(IDS)
MADE = Provenance(
    source="made",
    digest="0",
    vocabulary=IDS,
    text="bytes",
    vision=None,
    making=Making(min_pixels=64, max_pixels=64),
)


def text_document(length: int, seed: int = 0) -> Document:
    words = np.random.default_rng(seed).integers(97, 123, length - 2)
    return Document([IDS.bos, *words.tolist(), IDS.eos], Kind.TEXT)


def pair_document(caption: str, grid: tuple[int, int], seed: int = 0) -> Document:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(IDS.num_visual, grid, generator=generator)
    words = TEXT.encode(caption)
    ids = [IDS.bos, *words, *image_ids(codes, TEXT), IDS.eos]
    return Document(ids, Kind.PAIR, caption=len(words))


def chat_document_of(length: int, answers: Sequence[tuple[int, int]]) -> Document:
    return Document(text_document(length).ids, Kind.CHAT, answers=answers)


def mixed_documents(count: int, seed: int = 0) -> list[Document]:
    """Texts of 5 to 60 tokens, and as many pairs of 29 to 48 tokens."""
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        if number % 2:
            documents.append(text_document(int(random.integers(5, 60)), number))
        else:
            words = "a red seven and more"[: int(random.integers(1, 20))]
            documents.append(pair_document(words, (4, 4), number))
    return documents


def write_store(folder: Path, documents: Sequence[Document], shards: int = 1) -> Store:
    """The documents in ``shards`` shards of about as many."""
    for number, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        write_shard(folder / f"shard-{number}", [documents[i] for i in part], MADE)
    return Store(folder)
