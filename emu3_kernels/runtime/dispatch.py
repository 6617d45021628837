"""Which backend runs a call: explicit, local, loud. Names no op."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from emu3_kernels.ops import OPS
from emu3_kernels.runtime import library

ROOT = Path(__file__).parents[2]
_forced: dict[str | None, str] = {}
_record: dict[str, str] | None = None
_announced = False


def load(op: str, *names: str) -> dict[str, ModuleType | str]:
    """Import the backends of ``op``, in order of preference.

    A backend whose own dependency is not installed becomes the reason why.
    """
    backends: dict[str, ModuleType | str] = {}
    for name in names:
        try:
            backends[name] = import_module(path_of(op, name))
        except ModuleNotFoundError as missing:
            if (missing.name or "").startswith("emu3_kernels"):
                raise
            backends[name] = f"the package {missing.name!r} is not installed"
    return backends


def path_of(op: str, name: str) -> str:
    """Name the module of a part of ``op``; while families move, in one of several places."""
    names = (name, "cpu") if name == "native" else (name,)
    family = f"emu3_kernels.ops.{OPS.get(op, 'attention')}"
    for part in names:
        for path in (f"{family}.{op}_{part}", f"{family}.{part}"):
            if (ROOT / f"{path.replace('.', '/')}.py").exists():
                return path
    return f"emu3_kernels.ops.{op}.{name}"


def why_not(backend: ModuleType | str, *args) -> str | None:
    """Return the reason why ``backend`` cannot run on ``args``, or None."""
    return backend if isinstance(backend, str) else backend.why_not(*args)


def choose(op: str, backends: Mapping[str, ModuleType | str], backend: str | None, *args) -> str:
    """Name the backend that runs ``op`` on ``args``.

    A backend asked for by name runs or raises: it is never swapped for another.
    With none asked for, the first that supports the call runs, and the
    reference, which supports every call, if no other does.
    """
    asked = backend or (_forced and (_forced.get(op) or _forced.get(None)))
    chosen = _named(op, backends, asked, *args) if asked else _first(backends, *args)
    if _record is not None:
        _record[op] = chosen
    return chosen


def _first(backends: Mapping[str, ModuleType | str], *args) -> str:
    for name, module in backends.items():
        if not isinstance(module, str) and module.why_not(*args) is None:
            return name
    _announce_missing_library()
    return "reference"


def _named(op: str, backends: Mapping[str, ModuleType | str], asked: str, *args) -> str:
    if asked == "reference":
        return asked
    if asked not in backends:
        known = ", ".join((*backends, "reference"))
        raise ValueError(f"{op}: unknown backend {asked!r}; expected one of {known}")
    reason = why_not(backends[asked], *args)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend {asked!r} cannot run this call: {reason}")
    return asked


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Make ``ops``, or every op, inside the block run on ``backend``, as if asked for by name.

    For tests, bug hunts and comparisons; one setting for the whole process, all threads.
    """
    global _forced
    before = _forced
    _forced = before | dict.fromkeys(ops, backend) if ops else {None: backend}
    try:
        yield
    finally:
        _forced = before


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Collect the backend that each op inside the block runs on, the last call's for each."""
    global _record
    before, _record = _record, {}
    try:
        yield _record
    finally:
        _record = before


def _announce_missing_library() -> None:
    global _announced
    if library.MISSING and not _announced:
        _announced = True
        warnings.warn(f"emu3_kernels: {library.MISSING}; the reference runs", stacklevel=4)
