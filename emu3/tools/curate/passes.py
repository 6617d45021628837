"""What is done to rows once they are measured: votes and captions, each row once."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from emu3.tools.bulk import Item, Outcome, Report, each
from emu3.tools.curate.decide import Row
from emu3.tools.curate.endpoint import Clocking, Endpoint, EndpointError, Reply
from emu3.tools.curate.frames import images_of
from emu3.tools.curate.journal import Journal
from emu3.tools.curate.settings import CaptionSettings, digest_of
from emu3.voters import Voter

CAPTIONS = "captions"
_BLIND = "aesthetic", "damage"
"""Kinds of voters that ignore the prompt."""


@dataclass(frozen=True)
class _RowItem(Item):
    row: Row


def voter_column(name: str) -> str:
    """The column of a voter's scores: its kind, or the name of one's own function."""
    kind, _, what = name.partition(":")
    own = kind not in ("aesthetic", "clip", "hpsv2")
    return what if own else kind


def vote(out: Path, rows: Sequence[Row], name: str, voter: Voter) -> Outcome:
    """Score the images of this rank's rows by a voter; of a clip the lowest of its frames counts.

    Rows that it scored before are skipped.
    """
    column = voter_column(name)
    journal, made = Journal(out, column), digest_of(name, _stamps(name))
    sees_prompt = name.partition(":")[0] not in _BLIND

    def made_of(row: Row) -> str:
        return digest_of(made, _words(row)) if sees_prompt else made

    def work(item: _RowItem, given: Any, report: Report) -> None:
        _raise(given)
        prompts = [_words(item.row)] * len(given)
        score = float(voter(torch.stack(given).float() / 255, prompts).min())
        journal.add(_key(item.row), made=made_of(item.row), value=round(score, 6))

    def is_done(item: _RowItem) -> bool:
        return journal.records.get(_key(item.row), {}).get("made") == made_of(item.row)

    outcome = each(_items(rows), lambda item: _caught(images_of, item.row), work, is_done)
    journal.close()
    return outcome


def fill(out: Path, rows: Sequence[Row], column: str, journal: str | None = None) -> None:
    """Give every row its newest value of a journal, if there is one."""
    records = Journal(out, journal or column).records
    for row in rows:
        record = records.get(_key(row))
        if record is not None and record.get("value") is not None:
            row[column] = record["value"]


@dataclass
class Captioned:
    """Of this rank: the outcome, what all runs of all ranks spent, and rows that cost too much."""

    outcome: Outcome
    spent: float
    unaffordable: int


def caption(
    out: Path, rows: Sequence[Row], url: str, model: str, settings: CaptionSettings, key: str | None
) -> Captioned:
    """Ask an endpoint for the captions of this rank's rows; those that have one are skipped.

    Raises:
        EndpointError: the endpoint is not there, or refuses every request.
    """
    journal = Journal(out, CAPTIONS)
    made = digest_of(model, settings.prompt, settings.frames, settings.long_edge)
    spent, dearest = _costs(journal)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    budget = None if settings.max_cost is None else (settings.max_cost - spent) / ranks
    endpoint = Endpoint(url, model, settings, key=key, budget=budget, dearest_prompt=dearest)
    unaffordable = 0

    def work(item: _RowItem, given: Any, report: Report) -> None:
        nonlocal unaffordable
        _raise(given)
        if given is None:
            unaffordable += 1
            return
        before = journal.records.get(_key(item.row), {}).get("cost", 0.0)
        costs = {"cost": before + given.cost, "prompt_cost": given.prompt_cost}
        journal.add(_key(item.row), made=made, value=given.caption, **costs)
        if given.error:
            raise ValueError(f"{item.row['id']}: {given.error}")

    def is_done(item: _RowItem) -> bool:
        record = journal.records.get(_key(item.row), {})
        return record.get("made") == made and record["value"] is not None

    def read(item: _RowItem) -> Reply | None:
        return _ask(endpoint, item.row, settings.frames)

    caught: Callable = lambda item: _caught(read, item)  # noqa: E731
    outcome = each(_items(rows), caught, work, is_done, readers=settings.concurrency)
    journal.close()
    return Captioned(outcome, _costs(Journal(out, CAPTIONS))[0], unaffordable)


def _costs(journal: Journal) -> tuple[float, float]:
    """Of all captions, and of the most expensive prompt."""
    records = journal.records.values()
    dearest = max((record["prompt_cost"] for record in records), default=0.0)
    return sum(record["cost"] for record in records), dearest


def fill_captions(out: Path, rows: Sequence[Row]) -> None:
    """Give every row its newest caption, if there is one."""
    fill(out, rows, "caption", CAPTIONS)


def _ask(endpoint: Endpoint, row: Row, count: int) -> Reply | None:
    if endpoint.is_spent:
        return None
    if row["kind"] == "image":
        return endpoint.ask(images_of(row))
    first, length = row["first"], row["stop"] - row["first"]
    count = min(count, length)
    frames = [length * (2 * n + 1) // (2 * count) for n in range(count)]
    images = images_of(row, [first + frame for frame in frames])
    return endpoint.ask(images, Clocking(row["fps"], frames, length))


def _caught(function: Callable, *args: Any) -> Any:
    """What a thread returns, or its error, to be told by the thread that writes."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _raise(given: Any) -> None:
    """Raise an error of a thread; an ``OSError`` is of the row, unless the endpoint fails."""
    if isinstance(given, OSError) and not isinstance(given, EndpointError):
        raise ValueError(str(given)) from given
    if isinstance(given, Exception):
        raise given


def _items(rows: Sequence[Row]) -> list[_RowItem]:
    return [_RowItem(Path(row["source"]), PurePath(row["id"]), row) for row in rows]


def _key(row: Row) -> str:
    return f"{row['id']} {row['hash']}"


def _words(row: Row) -> str:
    return row["caption"] or row["words"] or ""


def _stamps(name: str) -> list[tuple[str, int, int]]:
    """Of a voter's files, so that other weights vote again."""
    folder = Path(name.partition(":")[2])
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
