"""The same work on many files: found, sharded over ranks, with progress; a bad file is skipped."""

import atexit
import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePath
from typing import TypeVar

import torch
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

S, T = TypeVar("S"), TypeVar("T")

_READERS = 4
# Ranks finish at different times; the first may wait long for the last.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Item:
    """A file, and its path relative to the input folder; bytes that are not UTF-8 as ``\\xff``."""

    source: Path
    name: PurePath


@dataclass(frozen=True)
class Found:
    """Files to work on, sorted by name, and how many were passed over, by their kind."""

    items: list[Item]
    passed_over: Counter[str]


def find(inputs: Sequence[Path], suffixes: Iterable[str]) -> Found:
    """The files with ``suffixes`` among ``inputs`` and in their folders, without hidden ones.

    A link to nothing and a folder that cannot be listed are among them, to fail when they are read.

    Raises:
        ValueError: an input is missing or has another suffix, nothing is found, or two files
            have one name.
    """
    suffixes = sorted(suffixes)
    items: dict[PurePath, Item] = {}
    passed_over: Counter[str] = Counter()
    for given in inputs:
        if given.is_dir():
            sources = _within(given, suffixes, passed_over)
        else:
            sources = [_checked(given, suffixes)]
        for path in sources:
            name = in_utf8(path.relative_to(given) if given.is_dir() else PurePath(path.name))
            if name in items and items[name].source != path:
                raise ValueError(f"{items[name].source} and {path} would both become {name}")
            items[name] = Item(path, name)
    if not items:
        where, there = ", ".join(map(str, inputs)), in_words(passed_over)
        raise ValueError(
            f"no file in {where} ends in one of {', '.join(suffixes)}"
            + (f"; there are {there}" if there else "")
        )
    return Found([items[name] for name in sorted(items)], passed_over)


def in_words(passed_over: Counter[str]) -> str:
    """``2 .txt, 1 .gif``, the most frequent kind first."""
    return ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common())


def _within(folder: Path, suffixes: Iterable[str], passed_over: Counter[str]) -> Iterator[Path]:
    with os.scandir(folder):  # a folder below may be unreadable, the given one may not
        unreadable: list[OSError] = []
    for where, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        passed_over.update("linked folders" for name in folders if Path(where, name).is_symlink())
        for path in (Path(where, name) for name in names if not name.startswith(".")):
            special = path.exists() and not path.is_file()
            if path.suffix.lower() in suffixes and not special:
                yield path
            else:
                passed_over["special files" if special else path.suffix or "without ending"] += 1
    yield from (Path(error.filename) for error in unreadable)


def in_utf8(name: PurePath) -> PurePath:
    """Safetensors and JSON take no other names."""
    return PurePath(os.fsencode(name).decode(errors="backslashreplace"))


def _checked(path: Path, suffixes: Iterable[str]) -> Path:
    if not path.is_file():
        raise ValueError(f"no file or folder {path}")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: must end in one of {', '.join(suffixes)}")
    return path


@dataclass(frozen=True)
class Outcome:
    """Number of files done, done before and passed over, and an error line for each failed file."""

    done: int
    skipped: int
    errors: list[str]
    passed_over: Counter[str] = field(default_factory=Counter)


Report = Callable[[str], None]
"""Shows the progress within one file."""


def each(
    items: Sequence[Item],
    read: Callable[[Item], T],
    work: Callable[[Item, T, Report], None],
    is_done: Callable[[Item], bool],
    *,
    readers: int = _READERS,
) -> Outcome:
    """Run ``read`` and then ``work`` on this rank's files, with a progress bar on rank 0.

    Any exception concerns one file: its line is printed to stderr at once, and the next file
    follows. Only an ``OSError`` of ``work``, such as a full disk, concerns the output and ends the
    run, unless the file's name is too long. Under torchrun a rank that has finished waits for the
    others, which torchrun would stop if it failed before them.

    Args:
        read: runs in threads, for the next few files while ``work`` runs on one.
        work: writes the output; what it still reads of its file passes through ``from_input``.
        is_done: whether a file can be skipped; called for all files before the first ``work``.
        readers: threads that ``read``.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = items[rank::ranks]
    todo = [item for item in share if not is_done(item)]
    errors = []
    with _progress(visible=rank == 0) as progress:
        task = progress.add_task("", total=len(todo))
        for item, reading in ahead(read, todo, readers):
            report = partial(_report, progress, task, item)
            report("")
            if error := _try(item, reading, work, report):
                errors.append(error)
                progress.console.print(f"emu3: {error}", markup=False, emoji=False, soft_wrap=True)
            progress.advance(task)
    if dist.is_torchelastic_launched():
        _wait_for_all()
    return Outcome(len(todo) - len(errors), len(share) - len(todo), errors)


def _wait_for_all() -> None:
    """Wait for the other ranks; a second group would find the first one's in torchrun's store."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    dist.barrier()


def from_input(values: Iterable[T]) -> Iterator[T]:
    """Yield ``values``, which are read from a file at work: an ``OSError`` is that file's."""
    try:
        yield from values
    except OSError as error:
        raise ValueError(str(error)) from None


def _try(
    item: Item,
    reading: Future[T],
    work: Callable[[Item, T, Report], None],
    report: Report,
) -> str | None:
    """The error line of one file, if there is an error."""
    try:
        given = reading.result()
    except Exception as error:
        return _line(item, error)
    try:
        work(item, given, report)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _line(item, error)
    except Exception as error:
        return _line(item, error)
    return None


def ahead(
    read: Callable[[S], T], items: Iterable[S], readers: int = _READERS
) -> Iterator[tuple[S, Future[T]]]:
    """Yield ``items`` and what ``read`` makes of them, in threads and a few items early."""
    with ThreadPoolExecutor(readers) as pool:
        waiting: deque[tuple[S, Future[T]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > 2 * readers:
                yield waiting.popleft()
        yield from waiting


def _report(progress: Progress, task: TaskID, item: Item, text: str) -> None:
    progress.update(task, description=f"{item.name} {text}")


def _progress(*, visible: bool) -> Progress:
    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


def _line(item: Item, error: Exception) -> str:
    if is_out_of_memory(error):
        line = "too large for the memory: tokenize it with a lower --max-pixels"
    elif isinstance(error, ValueError | OSError):
        line = " ".join(str(error).split())
    else:
        line = " ".join([f"{type(error).__name__}:", *str(error).split("\n")[0].split()])
    line = line if str(item.source) in line else f"{item.source}: {line}"
    return line.replace("\n", " ")


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that memory of the CPU or of a GPU was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch on the CPU, and CUDA outside PyTorch's allocator.
    texts = "can't allocate memory", "out of memory"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
