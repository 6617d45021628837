"""Samples in WebDataset tars, and in Emu3's own files of codes."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from emu3.data.store import Document, Kind
from emu3.tools.prepare.records import FIELDS, Medium, Sample, sample_of

_HEAD = 1 << 20


def tar_samples(path: Path) -> Iterator[Sample]:
    """Members of one stem are a sample: ``0.jpg``, ``0.txt`` and ``0.json`` of img2dataset.

    The caption is that of the ``.txt``, else ``caption`` of the ``.json``; what img2dataset states
    to have failed is passed over. Tars of ``emu3 store --tars`` have ``0.npy`` and ``0.json``.

    Raises:
        ValueError: one line, if the tar is damaged or truncated.
    """
    count = 0
    try:
        for key, members in _groups(path):
            count += 1
            if (sample := _tar_sample(path, key, members)) is not None:
                yield sample
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged after {count} samples: {error}") from None


def _groups(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = None, {}
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            if not member.isfile():
                continue
            name = PurePosixPath(member.name)
            stem, _, ending = name.name.partition(".")
            this = str(name.with_name(stem))
            if this != key and members:
                yield key, members
                members = {}
            key = this
            content = tar.extractfile(member).read()
            if len(content) < member.size:
                raise EOFError("unexpected end of data")
            members[ending.lower()] = content
        end = tar.offset
    if members:
        yield key, members
    with path.open("rb") as file:
        file.seek(end)
        # tarfile takes a damaged header for the end.
        rest = file.read(_HEAD)
    if len(rest) < 2 * tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise EOFError("it does not end where its members do")


def _tar_sample(path: Path, key: str, members: dict[str, bytes]) -> Sample | None:
    origin = f"{path}, {key}"
    try:
        stated = json.loads(members.pop("json", b"{}"))
        if "npy" in members:
            tokenizers = stated["text"], stated["vision"]
            return Sample(origin, made=_made(members["npy"], stated), tokenizers=tokenizers)
        if stated.get("status", "success") != "success":
            return None
        record = {name: value for name, value in members.items() if name in FIELDS}
        words = members["txt"].decode() if "txt" in members else stated.get("caption") or ""
        chat = {k: v for k, v in stated.items() if k in ("conversations", "messages", "texts")}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Sample(origin, error=f"{origin}: {' '.join(str(error).split())}")
    return sample_of({**record, **chat, "txt": words}, path.parent, origin)


def _made(array: bytes, stated: dict) -> Document:
    ids = np.load(io.BytesIO(array), allow_pickle=False)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers in one dimension, got {ids.dtype} {ids.shape}")
    answers = [(int(start), int(stop)) for start, stop in stated["answers"]]
    return Document(ids, Kind[stated["kind"].upper()], int(stated["caption"]), answers)


def official_samples(paths: Sequence[str], folder: Path) -> Iterator[Sample]:
    """Files ``{"name", "images": [h, w], "texts"}`` of Emu3's own trainer.

    Nothing in them is executed: only the classes of an array of integers are allowed.
    """
    for name in paths:
        path = folder / name
        try:
            yield Sample(str(path), parts=_official_parts(path))
        except Exception as error:
            line = str(error).strip().splitlines() or [type(error).__name__]
            line = line[0] if isinstance(error, OSError | ValueError) else _REFUSED
            yield Sample(str(path), error=f"{path}: {line}")


_REFUSED = "is not one of Emu3's files of codes: it is damaged, or has more than arrays and texts"


def _official_parts(path: Path) -> list:
    with torch.serialization.safe_globals(_allowed()):
        record = torch.load(path, weights_only=True)
    codes = torch.as_tensor(record["images"])
    if codes.ndim != 2 or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers [h, w], got {codes.dtype} {tuple(codes.shape)}")
    words = record.get("texts") or ""
    if not isinstance(words, str):
        raise ValueError(f"texts must be a string, got {type(words).__name__}")
    return [words, Medium(codes.long())] if words.strip() else [Medium(codes.long())]


def _allowed() -> list:
    """NumPy 1 wrote ``numpy.core``, NumPy 2 writes ``numpy._core``; both open in both."""
    core = np._core if hasattr(np, "_core") else np.core
    make = core.multiarray._reconstruct
    integers = (np.int16, np.int32, np.int64)
    return [
        (make, "numpy.core.multiarray._reconstruct"),
        (make, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in integers),
    ]
