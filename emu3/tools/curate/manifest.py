"""Rows to files: the manifest in Parquet, and what is kept as lines for ``emu3 prepare``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from emu3.files import replacing
from emu3.tools.curate.decide import Row
from emu3.tools.curate.settings import CurateSettings

MANIFEST, KEPT = "manifest.parquet", "kept.jsonl"
_KEY = "emu3_curate"
_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
COLUMNS = {
    "id": _TEXT,
    "kind": _TEXT,
    "keep": pa.bool_(),
    "reasons": pa.list_(_TEXT),
    "duplicate_of": _TEXT,
    "error": _TEXT,
    "name": _TEXT,
    "source": _TEXT,
    "offset": _WHOLE,
    "size": _WHOLE,
    "first": _WHOLE,
    "stop": _WHOLE,
    "begin": _REAL,
    "end": _REAL,
    "seconds": _REAL,
    "fps": _REAL,
    "width": _WHOLE,
    "height": _WHOLE,
    "short_edge": _WHOLE,
    "aspect": _REAL,
    "luma": _REAL,
    "text": _REAL,
    "flow": _REAL,
    "sharpness": _REAL,
    "colourfulness": _REAL,
    "hash": _TEXT,
    "words": _TEXT,
    "caption": _TEXT,
}
"""Of every manifest; the scores of voters follow."""


def write_manifest(
    out: Path, rows: Sequence[Row], voters: Sequence[str], settings: CurateSettings
) -> None:
    """Write ``manifest.parquet`` with all rows and ``kept.jsonl`` with those that are kept."""
    columns = [*COLUMNS.items(), *((name, _REAL) for name in voters)]
    schema = pa.schema(columns, {_KEY: settings.model_dump_json()})
    table = pa.Table.from_pylist(list(rows), schema)
    with replacing(out / MANIFEST) as draft:
        parquet.write_table(table, draft, compression="zstd")
    with replacing(out / KEPT) as draft, draft.open("w", encoding="utf-8") as file:
        for row in rows:
            if row["keep"]:
                file.write(json.dumps(_record(row), ensure_ascii=False) + "\n")


def read_manifest(out: Path) -> tuple[list[Row], CurateSettings]:
    """The rows of a manifest, and its settings.

    Raises:
        ValueError: one line, if there is none or it is damaged.
    """
    path = out / MANIFEST
    if not path.is_file():
        raise ValueError(f"curate: no file {path}: name the folders or tars to measure")
    try:
        table = parquet.read_table(path)
        settings = CurateSettings.model_validate_json(table.schema.metadata[_KEY.encode()])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"curate: {path} is not a manifest of emu3 curate: {line}") from None
    return table.to_pylist(), settings


def new_row(voters: Sequence[str] = (), **values: Any) -> Row:
    """A row with every column, None where there is no value."""
    return {**dict.fromkeys([*COLUMNS, *voters]), **values}


def _record(row: Row) -> dict[str, Any]:
    """A line of the JSONL that ``emu3 prepare`` reads."""
    content: Any = row["source"]
    if row["offset"] is not None:
        content = {"path": content, "offset": row["offset"], "size": row["size"]}
    record = {"video" if row["kind"] == "clip" else "image": content}
    if row["kind"] == "clip":
        record["span"] = [row["begin"], row["end"]]
    return record | {"text": row["caption"] or row["words"] or ""}
