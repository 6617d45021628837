"""Token stores: their bytes, their damage, and what a killed writer leaves."""

import os
import pickle
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from emu3.data.store import BIN, IDX, META, Document, Kind, Store, write_shard
from tests import children
from tests.train.stores import (
    IDS,
    MADE,
    chat_document_of,
    mixed_documents,
    pair_document,
    text_document,
    write_store,
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_shard_is_megatrons_byte_for_byte(tmp_path):
    """The bytes that ``IndexedDatasetBuilder`` of megatron-core writes for these documents."""
    documents = [Document([259, 97, 260], Kind.TEXT), Document([259, 260], Kind.TEXT)]
    write_shard(tmp_path / "a", documents, MADE)
    assert (tmp_path / f"a{BIN}").read_bytes() == bytes.fromhex(
        "03010000 61000000 04010000 03010000 04010000"
    )
    assert (tmp_path / f"a{IDX}").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00"  # MMIDIDX, and two zeros
        "0100000000000000"  # version 1
        "04"  # int32
        "0200000000000000 0300000000000000"  # two sequences, three marks of documents
        "03000000 02000000"  # tokens of the sequences
        "0000000000000000 0c00000000000000"  # where they start, in bytes
        "0000000000000000 0100000000000000 0200000000000000"  # marks
    )


def test_megatrons_reader_finds_every_document(tmp_path):
    """The steps of ``_IndexReader`` and ``_MMapBinReader``, whose shards have any number."""
    documents = mixed_documents(20)
    write_store(tmp_path, documents)
    raw = (tmp_path / f"shard-0{IDX}").read_bytes()
    version, code, count, marks = struct.unpack("<QBQQ", raw[9:34])
    lengths = np.frombuffer(raw, np.int32, count, 34)
    pointers = np.frombuffer(raw, np.int64, count, 34 + lengths.nbytes)
    ends = np.frombuffer(raw, np.int64, marks, 34 + lengths.nbytes + pointers.nbytes)
    tokens = (tmp_path / f"shard-0{BIN}").read_bytes()
    assert (version, code, ends.tolist()) == (1, 4, list(range(21)))
    for document, length, pointer in zip(documents, lengths, pointers, strict=True):
        assert np.frombuffer(tokens, np.int32, length, pointer).tolist() == list(document.ids)


def test_documents_come_back_with_what_their_ids_do_not_say(tmp_path):
    chat = chat_document_of(40, [(5, 9), (20, 40)])
    documents = [*mixed_documents(7), chat, text_document(9)]
    store = write_store(tmp_path, documents, shards=3)
    lengths, kinds, captions = store.columns(np.arange(len(store))[::-1])
    assert lengths.tolist() == [len(d.ids) for d in documents][::-1]
    assert kinds.tolist() == [d.kind for d in documents][::-1]
    assert captions.tolist() == [d.caption for d in documents][::-1]
    for number, document in enumerate(documents):
        shard, inside = store.find(number)
        assert shard.ids(inside).tolist() == list(document.ids)
        assert [tuple(a) for a in shard.answers(inside)] == list(document.answers)
    assert store.tokens == sum(len(d.ids) for d in documents)
    assert store.kinds() == {"text": 4, "pair": 4, "mixed": 0, "chat": 1}


def test_a_reader_does_not_see_what_is_appended_later(tmp_path):
    store = write_store(tmp_path, mixed_documents(6), shards=2)
    write_shard(tmp_path / "a-third", mixed_documents(4), MADE)
    assert len(store) == len(pickle.loads(pickle.dumps(store))) == 6
    assert len(Store(tmp_path)) == 10
    assert Store(tmp_path).fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("ending", "change", "line"),
    [
        (BIN, lambda raw: raw[:-4], "must have .* bytes, got"),
        (BIN, lambda raw: raw + b"\0\0\0\0", "must have .* bytes, got"),
        (BIN, lambda raw: b"", "is empty"),
        (BIN, None, "is missing"),
        (IDX, lambda raw: b"", "is empty"),
        (IDX, lambda raw: raw[:-1], "is truncated"),
        (IDX, lambda raw: raw[:20], "is not an index of Megatron"),
        (IDX, lambda raw: b"X" + raw[1:], "is not an index of Megatron"),
        (IDX, lambda raw: raw[:17] + b"\x08" + raw[18:], "must hold int32 documents"),
        (META, lambda raw: raw[:-1], "is damaged"),
        (META, lambda raw: raw[:30], "is damaged"),
        (META, lambda raw: b"\xff" * 16, "is damaged"),
        (META, None, "is missing"),
    ],
)
def test_a_damaged_shard_is_told_in_one_line(ending, change, line, tmp_path):
    write_store(tmp_path, mixed_documents(8))
    path = tmp_path / f"shard-0{ending}"
    raw = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(raw))
    with pytest.raises(ValueError, match=line) as told:
        Store(tmp_path)
    assert "\n" not in str(told.value)
    assert "shard-0" in str(told.value)


def test_an_index_or_sidecar_of_another_shard_is_refused(tmp_path):
    write_store(tmp_path / "a", mixed_documents(8))
    write_store(tmp_path / "b", mixed_documents(9))
    (tmp_path / "a" / f"shard-0{META}").write_bytes(
        (tmp_path / "b" / f"shard-0{META}").read_bytes()
    )
    with pytest.raises(ValueError, match=r"has 8 documents, its .meta.safetensors 9"):
        Store(tmp_path / "a")


@pytest.mark.parametrize(("ending", "at"), [(BIN, 5), (IDX, 37), (IDX, 60)])
def test_a_changed_byte_is_found(ending, at, tmp_path):
    """By ``verify`` in any case, and on reading wherever ids or places are impossible."""
    store = write_store(tmp_path, mixed_documents(8))
    for shard in store.shards:
        shard.verify()
    path = tmp_path / f"shard-0{ending}"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x7F
    path.write_bytes(raw)
    shard = Store(tmp_path).shards[0]
    with pytest.raises(ValueError, match="its bytes are not those written"):
        shard.verify()
    with pytest.raises(ValueError, match="is damaged"):
        [shard.ids(document) for document in range(len(shard))]


def test_shards_of_two_tokenizers_are_not_one_store(tmp_path):
    write_shard(tmp_path / "a", [text_document(5)], MADE)
    write_shard(
        tmp_path / "b", [pair_document("x", (2, 2))], MADE.model_copy(update={"vision": "1"})
    )
    assert len(Store(tmp_path)) == 2
    write_shard(
        tmp_path / "c", [pair_document("x", (2, 2))], MADE.model_copy(update={"vision": "2"})
    )
    with pytest.raises(ValueError, match="c was made with other tokenizers than"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("documents", "line"),
    [
        ([], "would be empty"),
        ([Document([], Kind.TEXT)], "must have tokens"),
        ([text_document(5), Document([IDS.size], Kind.TEXT)], r"ids must be in \[0, "),
        ([Document([-1], Kind.TEXT)], r"ids must be in \[0, "),
    ],
)
def test_what_is_no_document_leaves_no_file(documents, line, tmp_path):
    with pytest.raises(ValueError, match=line):
        write_shard(tmp_path / "a", documents, MADE)
    assert not list(tmp_path.iterdir())


def _write(out: Path) -> None:
    write_shard(out / "a", mixed_documents(30), MADE)


def _forked(out: Path, death: int | None) -> int:
    """Write in a process that kills itself after a flush or rename, 0 for before the first.

    Returns its exit code: the number of these if it ends.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def counted(real):
        def call(*given, **named):
            nonlocal count
            count += 1
            try:
                return real(*given, **named)
            finally:
                if count == death:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    if death == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _write(out)
    os._exit(count)


def _kill_at_every_moment(folder: Path) -> int:
    """Return the number of moments; in a process without threads, which may be forked."""
    events = _forked(folder / "whole", None)
    whole = files(folder / "whole")
    assert len(whole) == 3
    for number in range(events + 1):
        out = folder / str(number)
        assert _forked(out, number) == -signal.SIGKILL
        if list(out.glob(f"*{IDX}")):
            Store(out).shards[0].verify()
        _write(out)
        assert files(out) == whole
    return events


def test_a_writer_killed_at_any_moment_leaves_no_damaged_shard(tmp_path):
    """After each flush and rename; written again, the shard is the same."""
    assert children.run(_kill_at_every_moment, tmp_path) == 9


def _write_limited(out: Path, largest: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        write_shard(out / "a", mixed_documents(3), MADE)
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("largest", [100, 700])
def test_a_full_disk_leaves_no_shard_and_keeps_those_before(largest, tmp_path):
    """The kernel refuses the bytes of a file past ``largest``: of ``.bin``, or of a later file."""
    write_shard(tmp_path / "before", mixed_documents(3), MADE)
    assert "File too large" in children.run(_write_limited, tmp_path, largest)
    assert len(Store(tmp_path)) == 3
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
