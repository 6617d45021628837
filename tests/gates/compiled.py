"""C++ and CUDA C++ that is compiled for tests, kept on disk: a second run compiles nothing."""

import atexit
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from emu3_kernels.testing.cache import cached

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "c++")
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def with_includes(source: str, *folders: Path) -> str:
    """Return ``source`` and every header of ours that it includes, directly or not, each once.

    Headers are searched in ``folders``, then in ``csrc``.
    """
    texts, waiting = {"": source}, INCLUDE.findall(source)
    while waiting:
        name = waiting.pop()
        if name not in texts:
            paths = (folder / name for folder in (*folders, CSRC))
            texts[name] = next(path for path in paths if path.exists()).read_text()
            waiting += INCLUDE.findall(texts[name])
    return "\n".join(texts[name] for name in sorted(texts))


@cache
def version_of(compiler: str) -> str:
    """Return what ``compiler --version`` prints, which a key of the cache contains."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout


def file_of(key: str, make: Callable[[], bytes], suffix: str) -> Path:
    """Return an executable file that lives as long as this process, with ``cached(key, make)``."""
    path = _folder() / f"{sha256(key.encode()).hexdigest()[:16]}{suffix}"
    if not path.exists():
        path.write_bytes(cached(key, make))
        path.chmod(0o755)
    return path


@cache
def _folder() -> Path:
    folder = TemporaryDirectory(prefix="emu3_kernels_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def has(compiler: str) -> bool:
    return shutil.which(compiler) is not None
