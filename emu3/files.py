"""Atomic writes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from socket import gethostname
from tempfile import mkdtemp


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block succeeds.

    The bytes are flushed before the rename, so that a crash leaves the old file or the new one. On
    an exception the temporary file is removed and ``path`` is unchanged. Several processes may
    replace one file: each writes in a hidden folder of its own, and the last rename counts. What a
    killed process left is removed by the next one on its machine that writes into the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent.absolute())
    # A folder, because safetensors and others put temporary files of their own beside the draft.
    folder = Path(mkdtemp(".part", f".{_machine()}-{os.getpid()}-", path.parent))
    try:
        draft = folder / path.name
        yield draft
        flush(draft)
        os.replace(draft, path)
        flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Write what the system holds back of a file or folder to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _remove_stale(folder: Path) -> None:
    """Once per process and folder: listing a large folder for each file would take hours."""
    for stale in folder.glob(f".{_machine()}-*.part"):
        if not _lives(int(stale.name.split("-")[1])):
            shutil.rmtree(stale, ignore_errors=True)


@cache
def _machine() -> str:
    """Where a process id is unique: on a host, and on Linux in a namespace of processes."""
    namespace = Path("/proc/self/ns/pid")
    told = f"{gethostname()} {namespace.readlink() if namespace.is_symlink() else ''}"
    return blake2b(told.encode(), digest_size=4).hexdigest()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
