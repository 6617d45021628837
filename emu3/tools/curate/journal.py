"""What is measured, a line of JSON for each file, so that a killed run loses the file at work."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "scores"


class Journal:
    """Records by key, of all ranks and runs; the newest of a key counts.

    Each rank appends to a file of its own. A line that a kill or a crash broke off is passed over.
    """

    def __init__(self, out: Path, name: str) -> None:
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}-{int(os.environ.get('RANK', 0)):05}.jsonl"
        self._file = None
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob(f"{name}-[0-9]*.jsonl")):
            for record in _lines(path):
                known = self.records.get(record["key"])
                if known is None or known["at"] <= record["at"]:
                    self.records[record["key"]] = record

    def add(self, key: str, **values: Any) -> None:
        """Append a record and give it to the system at once.

        Raises:
            ValueError: one line, if another process appends to this rank's file.
        """
        record = {"key": key, "at": time.time_ns(), **values}
        self.records[key] = record
        if self._file is None:
            self._file = _open(self._path)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def names_of(out: Path) -> set[str]:
    """Of the journals that there are."""
    return {path.stem.rpartition("-")[0] for path in (out / FOLDER).glob("*-[0-9]*.jsonl")}


def _open(path: Path) -> Any:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"curate: another process is writing {path}") from None
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write(b"\n")
    return file


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.keys() >= {"key", "at"}:
                yield record
