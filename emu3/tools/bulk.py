"""The same work on many files: found, shared among ranks, counted, and no bad one in the way."""

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
# Ranks finish when their files do, so that the first may wait for long.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Item:
    """A file, and its path below the folder in which it was found."""

    source: Path
    name: PurePath


def find(inputs: Sequence[Path], suffixes: Iterable[str]) -> list[Item]:
    """The files of ``suffixes`` among ``inputs`` and in their folders, hidden ones left out.

    They are in the order of their names, whatever the file system's.

    Raises:
        ValueError: an input is missing or of another kind, nothing is found, or two files have
            one name.
    """
    suffixes = sorted(suffixes)
    items: dict[PurePath, Item] = {}
    for given in inputs:
        for path in given.rglob("*") if given.is_dir() else [given]:
            name = path.relative_to(given) if given.is_dir() else PurePath(path.name)
            if given.is_dir() and not _counts(path, name, suffixes):
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


def _counts(path: Path, name: PurePath, suffixes: Iterable[str]) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and path.suffix.lower() in suffixes and path.is_file()


@dataclass(frozen=True)
class Outcome:
    """How many files were worked on with success, how many had been, and a line for each other."""

    done: int
    kept: int
    faults: list[str]


Tell = Callable[[str], None]
"""Shows how far the work on one file has come."""


def each(
    items: Sequence[Item],
    read: Callable[[Item], T],
    work: Callable[[Item, T, Tell], None],
    is_done: Callable[[Item], bool],
) -> Outcome:
    """Do ``work`` on what ``read`` makes of this rank's share, with a progress bar on rank 0.

    A ``ValueError`` is the fault of one file: its line goes to stderr at once, so that a run that
    is killed has told it, and the next file follows. Any other exception, a full disk above all,
    ends the run. Under torchrun a rank that has finished
    waits for the others, which would be stopped if it failed before them.

    Args:
        read: runs in threads, for the next few files while one is worked on.
        is_done: whether a file can be left out; asked of all files before the first is worked on.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = items[rank::ranks]
    todo = [item for item in share if not is_done(item)]
    faults = []
    with _progress(visible=rank == 0) as progress:
        task = progress.add_task("", total=len(todo))
        for item, reading in _ahead(read, todo):
            tell = partial(_tell, progress, task, item)
            tell("")
            try:
                work(item, reading.result(), tell)
            except ValueError as fault:
                faults.append(_line(item, fault))
                progress.console.print(f"emu3: {faults[-1]}", markup=False, soft_wrap=True)
            progress.advance(task)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        dist.barrier()
        dist.destroy_process_group()
    return Outcome(len(todo) - len(faults), len(share) - len(todo), faults)


def _ahead(read: Callable[[Item], T], items: Sequence[Item]) -> Iterator[tuple[Item, Future[T]]]:
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Item, Future[T]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > 2 * _READERS:
                yield waiting.popleft()
        yield from waiting


def _tell(progress: Progress, task: TaskID, item: Item, text: str) -> None:
    progress.update(task, description=f"{item.name} {text}")


def _progress(*, visible: bool) -> Progress:
    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


def _line(item: Item, fault: ValueError) -> str:
    line = " ".join(str(fault).split())
    return line if str(item.source) in line else f"{item.source}: {line}"
