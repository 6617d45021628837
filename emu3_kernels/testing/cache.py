"""Results that outlive a test run, on disk: ``EMU3_TEST_CACHE``, else ``~/.cache/emu3_kernels``."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile

DIGEST_BYTES = sha256().digest_size


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """Return ``make()``, computed once for ``key`` on this machine.

    ``key`` must contain everything that the result depends on: sources, versions, sizes. A file
    starts with the SHA-256 of its content, and a damaged one is made anew. Processes may ask for
    the same key at the same time: each writes a file of its own and renames it. Where the folder
    cannot be written to, nothing is kept.
    """
    return cached_all([key], lambda _: [make()])[0]


def cached_all(keys: Sequence[str], make: Callable[[list[int]], Sequence[bytes]]) -> list[bytes]:
    """As :func:`cached`, several at once: ``make`` gets the indices to compute, if any.

    Of equal keys it gets the first.
    """
    found = {key: _read(_path(key)) for key in keys}
    if wanted := [keys.index(key) for key, content in found.items() if content is None]:
        for i, content in zip(wanted, make(wanted), strict=True):
            found[keys[i]] = content
            _keep(_path(keys[i]), content)
    return [found[key] for key in keys]


def _path(key: str) -> Path:
    name = sha256(key.encode()).hexdigest()
    return folder() / name[:2] / name


def _read(path: Path) -> bytes | None:
    with suppress(OSError):
        stored = path.read_bytes()
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if sha256(content).digest() == digest:
            return content
    return None


def _keep(path: Path, content: bytes) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(sha256(content).digest() + content)
        os.replace(file.name, path)


def folder() -> Path:
    """Return the folder of the cache; deleting it is always safe."""
    return Path(os.environ.get("EMU3_TEST_CACHE") or Path.home() / ".cache/emu3_kernels")
