"""Token stores: documents on disk as Megatron keeps them, ``NAME.bin`` and ``NAME.idx``.

A shard is three files. ``.bin`` holds the ids of all its documents, int32, one after the other.
``.idx`` is Megatron's index with one sequence to a document: its readers and ``GPTDataset`` take
a shard as it is. ``.meta.safetensors`` holds what the ids do not say. The index is renamed last: a
shard without it does not exist. A store is a folder of shards, in the order of their names.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from safetensors.numpy import save

from emu3.config import Vocabulary
from emu3.data.codes import Making
from emu3.files import replacing
from emu3.settings import Settings, SettingsError, parse

BIN, IDX, META = ".bin", ".idx", ".meta.safetensors"
_MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<QBQQ")
"""Version, code of the dtype, number of sequences, number of marks of documents."""
_VERSION, _INT32 = 1, 4
_START = len(_MAGIC) + _HEAD.size
_KEY = "emu3_store"
_DTYPES = {"I8": np.int8, "I32": np.int32, "I64": np.int64}
_PIECE = 1 << 24


class Kind(IntEnum):
    """What a document is made of."""

    TEXT = 0
    PAIR = 1
    """A caption, and then one image or clip."""
    MIXED = 2
    """Texts, images and clips in any other order."""
    CHAT = 3


@dataclass(frozen=True)
class Document:
    """The ids of a document, and what they do not say."""

    ids: Sequence[int]
    kind: Kind
    caption: int = 0
    """Tokens of a pair's caption."""
    answers: Sequence[tuple[int, int]] = ()
    """First token and end of every answer in a chat."""


class Provenance(Settings):
    """What the documents of a shard were made of, and by what."""

    source: str
    """Name of the input, and the part of it."""
    digest: str
    """Of the part of the input."""
    vocabulary: Vocabulary
    text: str
    """Fingerprint of the text tokenizer."""
    vision: str | None
    """Fingerprint of the vision tokenizer; None if there are no images."""
    making: Making


class Header(Settings):
    """The metadata of a shard, in JSON."""

    version: int = 1
    made: Provenance
    documents: PositiveInt
    tokens: PositiveInt
    left_out: NonNegativeInt
    """Samples of the input that could not be read."""
    idx_sha256: str
    bin_sha256: str


@dataclass
class _Columns:
    lengths: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    """Where the answers of each document end in ``answers``."""


def write_shard(
    prefix: Path, documents: Iterable[Document], made: Provenance, left_out: Sequence[str] = ()
) -> Header:
    """Write the shard ``prefix``, whose three files appear whole or not at all.

    Args:
        left_out: a line for each sample that could not be read; counted after the last document,
            so that the iterator may append to it.

    Raises:
        ValueError: one line, if there is no document, one is empty, or an id is not in the
            vocabulary.
    """
    columns, sha = _Columns(), hashlib.sha256()
    with replacing(_file(prefix, BIN)) as draft, draft.open("wb") as file:
        for document in documents:
            ids = _checked(document, made.vocabulary.size)
            file.write(ids.data)
            sha.update(ids.data)
            columns.lengths.append(len(ids))
            columns.kinds.append(document.kind)
            columns.captions.append(document.caption)
            columns.answers.extend(document.answers)
            columns.ends.append(len(columns.answers))
        if not columns.lengths:
            raise ValueError(f"store: {prefix.name} would be empty: no sample could be read")
    index = index_bytes(np.array(columns.lengths))
    header = Header(
        made=made,
        documents=len(columns.lengths),
        tokens=sum(columns.lengths),
        left_out=len(left_out),
        idx_sha256=hashlib.sha256(index).hexdigest(),
        bin_sha256=sha.hexdigest(),
    )
    with replacing(_file(prefix, META)) as draft:
        draft.write_bytes(save(_arrays(columns), {_KEY: header.model_dump_json()}))
    with replacing(_file(prefix, IDX)) as draft:
        draft.write_bytes(index)
    return header


def index_bytes(lengths: np.ndarray) -> bytes:
    """Megatron's index of int32 documents, one sequence each; offsets count bytes."""
    offsets = np.concatenate(([0], np.cumsum(4 * lengths[:-1], dtype=np.int64)))
    marks = np.arange(len(lengths) + 1)
    head = _HEAD.pack(_VERSION, _INT32, len(lengths), len(marks))
    columns = lengths.astype("<i4"), offsets.astype("<i8"), marks.astype("<i8")
    return b"".join((_MAGIC, head, *(column.tobytes() for column in columns)))


def _checked(document: Document, size: int) -> np.ndarray:
    ids = np.asarray(document.ids, "<i4")
    if not len(ids):
        raise ValueError("store: a document must have tokens, got none")
    if ids.min() < 0 or ids.max() >= size:
        wrong = ids[(ids < 0) | (ids >= size)][0]
        raise ValueError(f"store: ids must be in [0, {size}), got {wrong}")
    return np.ascontiguousarray(ids)


def _arrays(columns: _Columns) -> dict[str, np.ndarray]:
    return {
        "answer_ends": np.array(columns.ends, np.int64),
        "captions": np.array(columns.captions, np.int32),
        "answers": np.array(columns.answers, np.int32).reshape(-1, 2),
        "kinds": np.array(columns.kinds, np.int8),
    }


def _file(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


class Shard:
    """A shard, mapped into memory: opening it reads two headers.

    Raises:
        ValueError: one line, if a file is missing, truncated, or does not belong to the others.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.header, arrays = _read_meta(_file(prefix, META))
        self.kinds, self.captions = arrays["kinds"], arrays["captions"]
        self._answers, self._ends = arrays["answers"], arrays["answer_ends"]
        self.lengths, self._offsets = self._read_index()
        raw = _mapped(_file(prefix, BIN))
        self._check(len(raw))
        self._ids = raw.view("<i4")

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, document: int) -> np.ndarray:
        """The ids of a document, int32; a view of the file."""
        start, length = int(self._offsets[document]) // 4, int(self.lengths[document])
        ids = self._ids[start : start + length]
        if start < 0 or len(ids) != length or ids.min() < 0:
            raise ValueError(f"store: {self.prefix} is damaged: its index, in document {document}")
        if ids.max() >= self.header.made.vocabulary.size:
            raise ValueError(f"store: {self.prefix} is damaged: ids of document {document}")
        return ids

    def answers(self, document: int) -> np.ndarray:
        """First token and end of every answer, ``[n, 2]``."""
        start, stop = self._ends[document : document + 2]
        return self._answers[start:stop]

    def verify(self) -> None:
        """Read the whole shard; one line if a byte differs from what was written."""
        known = {IDX: self.header.idx_sha256, BIN: self.header.bin_sha256}
        for ending, sha256 in known.items():
            path = _file(self.prefix, ending)
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(_PIECE):
                    digest.update(piece)
            if digest.hexdigest() != sha256:
                raise ValueError(f"store: {path} is damaged: its bytes are not those written")

    def _read_index(self) -> tuple[np.ndarray, np.ndarray]:
        path = _file(self.prefix, IDX)
        raw = _mapped(path)
        if len(raw) < _START or bytes(raw[: len(_MAGIC)]) != _MAGIC:
            raise ValueError(f"store: {path} is not an index of Megatron")
        version, code, count, marks = _HEAD.unpack(bytes(raw[len(_MAGIC) : _START]))
        if (version, code, marks) != (_VERSION, _INT32, count + 1):
            raise ValueError(
                f"store: {path} must hold int32 documents of one sequence each, got version "
                f"{version}, dtype {code}, {count} sequences and {marks} marks"
            )
        if len(raw) != _START + 12 * count + 8 * marks:
            raise ValueError(f"store: {path} is truncated: {len(raw)} bytes for {count} documents")
        lengths, rest = raw[_START : _START + 4 * count], raw[_START + 4 * count :]
        return lengths.view("<i4"), rest[: 8 * count].view("<i8")

    def _check(self, size: int) -> None:
        count, header = len(self.lengths), self.header
        if not count == header.documents == len(self.kinds) == len(self.captions):
            raise ValueError(
                f"store: {self.prefix}{IDX} has {count} documents, its {META} {header.documents}"
            )
        if size != 4 * header.tokens or self._offsets[-1] + 4 * self.lengths[-1] != size:
            raise ValueError(
                f"store: {self.prefix}{BIN} must have {4 * header.tokens} bytes, got {size}"
            )


class Store:
    """The documents of a folder of shards, numbered through; what is appended later is not seen.

    Args:
        folder: of the shards.
        names: the shards to read; None reads all that are there.

    Raises:
        ValueError: one line, if there is no shard, one is damaged, or two have other tokenizers.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        if names is None:
            names = [path.name.removesuffix(IDX) for path in folder.glob(f"*{IDX}")]
        if not names:
            raise ValueError(f"store: no shard in {folder}: no file ends in {IDX}")
        self.names = sorted(names)
        self.shards = [Shard(folder / name) for name in self.names]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.tokens = sum(shard.header.tokens for shard in self.shards)
        self._same_tokenizers()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple:
        return Store, (self.folder, self.names)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.shards[0].header.made.vocabulary

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the names and contents of all shards."""
        contents = [
            (name, shard.header.idx_sha256, shard.header.bin_sha256)
            for name, shard in zip(self.names, self.shards, strict=True)
        ]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]

    def kinds(self) -> dict[str, int]:
        """The number of documents of each kind."""
        counts = sum(np.bincount(shard.kinds, minlength=len(Kind)) for shard in self.shards)
        return {kind.name.lower(): int(counts[kind]) for kind in Kind}

    def columns(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, kinds and tokens of the captions of ``documents``, int64 ``[n]`` each."""
        at = np.searchsorted(self.starts, documents, side="right") - 1
        found = np.empty((3, len(documents)), np.int64)
        order = np.argsort(at, kind="stable")
        edges = np.flatnonzero(np.diff(at[order], prepend=-1))
        for mine in np.split(order, edges[1:]) if len(order) else ():
            shard = self.shards[at[mine[0]]]
            inside = documents[mine] - self.starts[at[mine[0]]]
            for row, column in enumerate((shard.lengths, shard.kinds, shard.captions)):
                found[row, mine] = column[inside]
        return tuple(found)

    def find(self, document: int) -> tuple[Shard, int]:
        """The shard of a document, and its number there."""
        at = int(np.searchsorted(self.starts, document, side="right")) - 1
        return self.shards[at], document - int(self.starts[at])

    def _same_tokenizers(self) -> None:
        first = self.shards[0]
        vision = None
        for shard in self.shards:
            made = shard.header.made
            vision = vision or made.vision
            same = (first.header.made.vocabulary, first.header.made.text, made.vision or vision)
            if (made.vocabulary, made.text, vision) != same:
                raise ValueError(
                    f"store: {shard.prefix} was made with other tokenizers than {first.prefix}"
                )


def read_header(prefix: Path) -> Header:
    """What the shard ``prefix`` was made of."""
    return _read_meta(_file(prefix, META))[0]


def _read_meta(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header, and views of the arrays in the file: safetensors itself would copy them."""
    raw = _mapped(path)
    try:
        size = int(raw[:8].view("<u8")[0])
        entries = json.loads(bytes(raw[8 : 8 + size]))
        header = parse(Header, json.loads(entries.pop("__metadata__")[_KEY]))
        arrays = {name: _array(raw[8 + size :], entry) for name, entry in entries.items()}
        if missing := {"kinds", "captions", "answers", "answer_ends"} - arrays.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except SettingsError as error:
        raise ValueError(f"store: {path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"store: {path} is damaged: {' '.join(str(error).split())}") from None
    return header, arrays


def _array(data: np.ndarray, entry: dict) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if stop > len(data):
        raise ValueError("it is truncated")
    return data[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"store: {path} is missing")
    if not path.stat().st_size:
        raise ValueError(f"store: {path} is empty")
    return np.memmap(path, np.uint8, "r").view(np.ndarray)
