"""One training to a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if missing, for this process.

    The kernel releases the lock when the process ends, however it ends. The file ``.lock`` stays:
    if it were removed, two processes could each lock a file of their own.

    Raises:
        ValueError: one line, if another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"train: another process is training in {folder}") from None
        yield
