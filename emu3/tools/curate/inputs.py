"""The images and videos of folders and tars, each with the words that come with it."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePath, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any

from emu3.data.media import IMAGES, VIDEOS
from emu3.tools.bulk import Item, find, in_utf8
from emu3.tools.prepare.inputs import caption_of

_TAR = ".tar"
_WORDS = "txt", "json"


@dataclass(frozen=True)
class File(Item):
    """An image or a video: a file, or a member of a tar."""

    stamp: str
    """Size and time of the file or tar, by which a change is noticed."""
    tar: Path | None = None
    offset: int | None = None
    size: int | None = None
    """Bytes of a member, from ``offset`` of the tar on."""
    words: str | None = None
    """The caption of a member; that of a file is read when it is measured."""
    error: str | None = None
    """Why it is not read: a tar that is damaged, or a path that no table can hold."""

    @property
    def is_video(self) -> bool:
        return self.name.suffix.lower() in VIDEOS

    @property
    def where(self) -> dict[str, Any]:
        """The entries of a row that say where its content is."""
        source = str(in_utf8(self.tar or self.source))
        return {"name": str(self.name), "source": source, "offset": self.offset, "size": self.size}


def files_of(inputs: Sequence[Path]) -> tuple[list[File], Counter[str]]:
    """Every image and video of ``inputs``, sorted, and what was passed over, by kind.

    Raises:
        ValueError: one line, if an input is missing or nothing is found.
    """
    found = find(inputs, {*IMAGES, *VIDEOS, _TAR})
    files = []
    for item in found.items:
        if item.source.suffix.lower() == _TAR:
            files += _members(item, found.passed_over)
        else:
            path = item.source.absolute()
            error = None if in_utf8(path) == path else f"{in_utf8(path)}: a path must be UTF-8"
            files.append(File(path, item.name, _stamp(path), error=error))
    return files, found.passed_over


def words_of(file: File) -> str:
    """The caption that comes with a file, or an empty string."""
    if file.tar is not None:
        return file.words or ""
    return caption_of(file.source)


@contextmanager
def opened(where: Mapping[str, Any]) -> "Iterator[Path | BytesIO]":
    """What the readers of media take: a path, or the bytes of an image in a tar, with a name.

    PyAV must go back in a file, so that a video in a tar is copied to a temporary file.

    Args:
        where: ``File.where``, or a row, which has its entries.
    """
    if where["offset"] is None:
        yield Path(where["source"])
        return
    name = PurePath(where["name"])
    with open(where["source"], "rb") as tar:
        tar.seek(where["offset"])
        content = tar.read(where["size"])
    if len(content) < where["size"]:
        raise ValueError(f"{where['source']} ends inside {name.name}")
    if name.suffix.lower() not in VIDEOS:
        yield _Named(content, f"{where['source']}, {name.name}")
        return
    with NamedTemporaryFile(suffix=name.suffix) as copy:
        copy.write(content)
        copy.flush()
        yield Path(copy.name)


class _Named(BytesIO):
    """Bytes that errors name by their origin."""

    def __init__(self, content: bytes, origin: str) -> None:
        super().__init__(content)
        self._origin = origin

    def __str__(self) -> str:
        return self._origin


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        # It fails again when it is read, and is told then.
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}"


def _members(item: Item, passed_over: Counter[str]) -> Iterator[File]:
    tar, stamp = item.source.absolute(), _stamp(item.source)
    files: dict[str, File] = {}
    words: dict[str, str] = {}
    try:
        for member, content in _contents(tar):
            path = PurePosixPath(member.name)
            ending = path.suffix.lower()
            if ending in IMAGES | VIDEOS:
                where = {"tar": tar, "offset": member.offset_data, "size": member.size}
                path = in_utf8(path)
                files[member.name] = File(tar / path, item.name / path, stamp, **where)
            elif content is not None:
                said = _said(ending, content)
                if said and (ending == ".txt" or _stem(path) not in words):
                    words[_stem(path)] = said
            else:
                passed_over[f"{ending or 'without ending'} in tars"] += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        line = f"{tar} is damaged after {len(files)} images and videos: {error}"
        yield File(tar, item.name, stamp, error=" ".join(line.split()))
    for name, file in files.items():
        said = words.get(_stem(PurePosixPath(name)))
        yield replace(file, words=said)


def _contents(tar: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Members in their order, and the bytes of those that may hold a caption."""
    size = tar.stat().st_size
    with tarfile.open(tar, "r:") as opened:
        for member in opened:
            if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                continue
            if member.offset_data + member.size > size:
                raise EOFError(f"it ends inside {member.name}")
            is_words = member.name.lower().endswith(_WORDS)
            yield member, opened.extractfile(member).read() if is_words else None
        end = opened.offset
    with tar.open("rb") as file:
        # tarfile takes a damaged header for the end.
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE).strip(b"\0"):
            raise EOFError("it does not end where its members do")


def _stem(path: PurePosixPath) -> str:
    return str(path.with_name(path.name.partition(".")[0]))


def _said(ending: str, content: bytes) -> str:
    try:
        if ending == ".txt":
            return content.decode("utf-8-sig").strip()
        return (json.loads(content).get("caption") or "").strip()
    except (ValueError, AttributeError):
        return ""
