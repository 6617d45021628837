"""Inputs to units: the samples that become one shard, the same on every run and rank."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from emu3.data.media import IMAGES, VIDEOS
from emu3.tools.bulk import Item, find
from emu3.tools.prepare import archives, columns
from emu3.tools.prepare.records import CODES, Medium, Sample, sample_of

_HEAD = 1 << 20
_CAPTIONS = ".txt", ".json"


@dataclass(frozen=True)
class Unit:
    """The part of an input that becomes one shard."""

    name: str
    """Of the shard."""
    source: Path
    digest: str
    """Of what the samples are made of, as far as it can be told without reading all of it."""
    samples: Callable[[], Iterator[Sample]]


def units_of(inputs: Sequence[Path], size: int) -> list[Unit]:
    """Every unit of the inputs, in order.

    A folder that ``datasets`` saved, and a folder of tars or Parquet files, is read as such; any
    other as images, videos and files of codes, each with its caption beside it.

    Args:
        size: samples of a unit, about; a tar and an Arrow file are a unit each.

    Raises:
        ValueError: one line, if an input is missing or of an unknown kind, or two have one name.
    """
    units: dict[str, Unit] = {}
    for given in inputs:
        for unit in _units(given, size):
            if unit.name in units:
                other = units[unit.name].source
                raise ValueError(
                    f"prepare: {other} and {unit.source} would both become {unit.name}"
                )
            units[unit.name] = unit
    return list(units.values())


def _units(given: Path, size: int) -> Iterator[Unit]:
    if not given.exists():
        raise ValueError(f"prepare: no file or folder {given}")
    if not given.is_dir():
        yield from _of_file(given, given.stem, size)
        return
    name = given.resolve().name
    if arrows := columns.arrow_files(given):
        for path in arrows:
            inside = "-".join(path.relative_to(given).with_suffix("").parts)
            yield _whole(path, f"{name}-{inside}", columns.arrow_samples)
        return
    for ending in (".tar", ".parquet"):
        if paths := sorted(given.rglob(f"*{ending}")):
            for path in paths:
                inside = "-".join(path.relative_to(given).with_suffix("").parts)
                yield from _of_file(path, f"{name}-{inside}", size)
            return
    yield from _of_folder(given, name, size)


def _of_file(path: Path, name: str, size: int) -> Iterator[Unit]:
    ending = path.suffix.lower()
    if ending == ".tar":
        yield _whole(path, name, archives.tar_samples)
    elif ending == ".parquet":
        yield from _of_parquet(path, name, size)
    elif ending == ".jsonl":
        yield from _of_lines(path, name, size)
    elif ending == ".json":
        yield from _of_json(path, name, size)
    else:
        raise ValueError(f"prepare: {path} must be a folder, .jsonl, .json, .tar or .parquet")


def _whole(path: Path, name: str, samples: Callable[[Path], Iterator[Sample]]) -> Unit:
    return Unit(name, path, _digest_of(path), partial(samples, path))


def _digest_of(path: Path, *more: object) -> str:
    """Of its size and beginning: reading all of it may take hours."""
    with path.open("rb") as file:
        return _digest(path.stat().st_size, file.read(_HEAD), *more)


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _of_parquet(path: Path, name: str, size: int) -> Iterator[Unit]:
    for number, groups in enumerate(columns.row_groups(path, size)):
        samples = partial(columns.parquet_samples, path, groups)
        yield Unit(f"{name}-{number:05}", path, _digest_of(path, groups), samples)


def _of_lines(path: Path, name: str, size: int) -> Iterator[Unit]:
    with path.open("rb") as file:
        number = 0
        while True:
            start, digest, lines = file.tell(), hashlib.sha256(), 0
            for line in islice(file, size):
                digest.update(line)
                lines += 1
            if not lines:
                return
            samples = partial(_line_samples, path, start, number * size + 1, lines)
            yield Unit(f"{name}-{number:05}", path, digest.hexdigest()[:16], samples)
            number += 1


def _line_samples(path: Path, start: int, first: int, lines: int) -> Iterator[Sample]:
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(islice(file, lines), first):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                yield Sample(origin, error=f"{origin}: not JSON: {error}")
                continue
            yield sample_of(record, path.parent, origin)


def _of_json(path: Path, name: str, size: int) -> Iterator[Unit]:
    """A list of records, or the list of Emu3's own files of codes."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"prepare: {path} is not JSON: {error}") from None
    official = isinstance(found, dict) and "path_list" in found
    entries = found["path_list"] if official else found
    if not isinstance(entries, list):
        raise ValueError(f'prepare: {path} must be a list of records, or have a "path_list"')
    folder = path.parent / found.get("prefix", "") if official else path.parent
    for number, start in enumerate(range(0, len(entries), size)):
        part = entries[start : start + size]
        make = archives.official_samples if official else _record_samples
        origin = folder if official else path
        samples = (
            partial(make, part, origin, start) if not official else partial(make, part, folder)
        )
        yield Unit(f"{name}-{number:05}", path, _digest(part), samples)


def _record_samples(records: Sequence[dict], path: Path, start: int) -> Iterator[Sample]:
    for number, record in enumerate(records, start + 1):
        yield sample_of(record, path.parent, f"{path}, record {number}")


def _of_folder(folder: Path, name: str, size: int) -> Iterator[Unit]:
    items = find([folder], {*IMAGES, *VIDEOS, CODES}).items
    for number, start in enumerate(range(0, len(items), size)):
        part = items[start : start + size]
        sizes = [(str(item.name), _size(item.source)) for item in part]
        samples = partial(_file_samples, part)
        yield Unit(f"{name}-{number:05}", folder, _digest(sizes), samples)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _file_samples(items: Sequence[Item]) -> Iterator[Sample]:
    for item in items:
        path = item.source
        try:
            words = caption_of(path)
        except (OSError, ValueError) as error:
            yield Sample(str(path), error=f"{path}: {' '.join(str(error).split())}")
            continue
        medium = Medium(path, path.suffix.lower() in VIDEOS)
        yield Sample(str(path), parts=[words, medium] if words else [medium])


def caption_of(path: Path) -> str:
    """Of ``a/b.jpg``: in ``a/b.jpg.txt``, ``a/b.txt``, or as ``caption`` in JSON of these names.

    Codes ``a/b.jpg.safetensors`` have the caption of ``a/b.jpg``.
    """
    image = path.with_suffix("") if path.suffix.lower() == CODES else path
    for ending in _CAPTIONS:
        for beside in (image.with_name(image.name + ending), image.with_suffix(ending)):
            if beside.is_file():
                words = beside.read_text("utf-8-sig")
                return words.strip() if ending == ".txt" else json.loads(words)["caption"].strip()
    return ""
