"""Samples in Parquet files, and in folders of Arrow files that ``datasets`` saved."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emu3.tools.prepare.records import FIELDS, Sample, sample_of

_ROWS = 16
"""Rows that are read at a time: each may have an image."""


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``save_to_disk`` wrote, of all its splits."""
    states = [folder / "state.json", *folder.glob("*/state.json")]
    return sorted(p for state in states if state.is_file() for p in state.parent.glob("*.arrow"))


def arrow_samples(path: Path) -> Iterator[Sample]:
    arrow = _pyarrow(path)
    try:
        with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
            row = 0
            for batch in stream:
                yield from _samples(batch, path, row)
                row += batch.num_rows
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def row_groups(path: Path, size: int) -> list[list[int]]:
    """Groups of rows, ``size`` rows together, about."""
    file = open_parquet(path)
    parts: list[list[int]] = []
    rows = size
    for group in range(file.num_row_groups):
        if rows >= size:
            parts.append([])
            rows = 0
        parts[-1].append(group)
        rows += file.metadata.row_group(group).num_rows
    return parts


def parquet_samples(path: Path, groups: list[int]) -> Iterator[Sample]:
    arrow, file = _pyarrow(path), open_parquet(path)
    metadata = file.metadata
    row = sum(metadata.row_group(group).num_rows for group in range(groups[0]))
    columns = [name for name in file.schema_arrow.names if name in FIELDS]
    try:
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=columns):
            yield from _samples(batch, path, row)
            row += batch.num_rows
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _samples(batch: Any, path: Path, first: int) -> Iterator[Sample]:
    batch = batch.select([name for name in batch.schema.names if name in FIELDS])
    for start in range(0, batch.num_rows, _ROWS):
        for number, record in enumerate(batch.slice(start, _ROWS).to_pylist(), first + start):
            yield sample_of(record, path.parent, f"{path}, row {number}")


def open_parquet(path: Path) -> Any:
    """Open a Parquet file; one line, if it is none, or pyarrow is not there."""
    arrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=True)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"prepare: {path} is not a Parquet file: {error}") from None


def _pyarrow(path: Path) -> Any:
    """Imported where it is needed: no other input does."""
    if find_spec("pyarrow") is None:
        raise ValueError(f"prepare: to read {path}, install emu3-kernels[data]")
    import pyarrow
    import pyarrow.ipc

    return pyarrow
