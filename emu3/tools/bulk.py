"""The same work on many files: found, sharded over ranks, with progress; a bad file is skipped."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePath
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_READERS = 4
# Ranks finish at different times; the first may wait long for the last.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Item:
    """A file, and its path relative to the input folder."""

    source: Path
    name: PurePath


def find(inputs: Sequence[Path], suffixes: Iterable[str]) -> list[Item]:
    """The files with ``suffixes`` among ``inputs`` and in their folders, without hidden ones.

    Sorted by name.

    Raises:
        ValueError: an input is missing or has another suffix, nothing is found, or two files
            have one name.
    """
    suffixes = sorted(suffixes)
    items: dict[PurePath, Item] = {}
    for given in inputs:
        for path in given.rglob("*") if given.is_dir() else [given]:
            name = path.relative_to(given) if given.is_dir() else PurePath(path.name)
            if given.is_dir() and not _matches(path, name, suffixes):
                continue
            if not path.is_file():
                raise ValueError(f"no file or folder {path}")
            if path.suffix.lower() not in suffixes:
                raise ValueError(f"{path}: must end in one of {', '.join(suffixes)}")
            if name in items and items[name].source != path:
                raise ValueError(f"{items[name].source} and {path} would both become {name}")
            items[name] = Item(path, name)
    if not items:
        where = ", ".join(map(str, inputs))
        raise ValueError(f"no file in {where} ends in one of {', '.join(suffixes)}")
    return [items[name] for name in sorted(items)]


def _matches(path: Path, name: PurePath, suffixes: Iterable[str]) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and path.suffix.lower() in suffixes and path.is_file()


@dataclass(frozen=True)
class Outcome:
    """Number of files done, number already done before, and an error line for each failed file."""

    done: int
    skipped: int
    errors: list[str]


Report = Callable[[str], None]
"""Shows the progress within one file."""


def each(
    items: Sequence[Item],
    read: Callable[[Item], T],
    work: Callable[[Item, T, Report], None],
    is_done: Callable[[Item], bool],
) -> Outcome:
    """Run ``read`` and then ``work`` on this rank's files, with a progress bar on rank 0.

    A ``ValueError`` concerns one file: its line is printed to stderr at once, and the next file
    follows. Any other exception, such as a full disk, ends the run. Under torchrun a rank that has
    finished waits for the others, which torchrun would stop if it failed before them.

    Args:
        read: runs in threads, for the next few files while ``work`` runs on one.
        is_done: whether a file can be skipped; called for all files before the first ``work``.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = items[rank::ranks]
    todo = [item for item in share if not is_done(item)]
    errors = []
    with _progress(visible=rank == 0) as progress:
        task = progress.add_task("", total=len(todo))
        for item, reading in _ahead(read, todo):
            report = partial(_report, progress, task, item)
            report("")
            try:
                work(item, reading.result(), report)
            except ValueError as error:
                errors.append(_line(item, error))
                progress.console.print(f"emu3: {errors[-1]}", markup=False, soft_wrap=True)
            progress.advance(task)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        dist.barrier()
        dist.destroy_process_group()
    return Outcome(len(todo) - len(errors), len(share) - len(todo), errors)


def _ahead(read: Callable[[Item], T], items: Sequence[Item]) -> Iterator[tuple[Item, Future[T]]]:
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Item, Future[T]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > 2 * _READERS:
                yield waiting.popleft()
        yield from waiting


def _report(progress: Progress, task: TaskID, item: Item, text: str) -> None:
    progress.update(task, description=f"{item.name} {text}")


def _progress(*, visible: bool) -> Progress:
    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


def _line(item: Item, error: ValueError) -> str:
    line = " ".join(str(error).split())
    return line if str(item.source) in line else f"{item.source}: {line}"
