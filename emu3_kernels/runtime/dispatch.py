"""Which backend runs a call: explicit, local, loud. Names no op."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from torch import Tensor

from emu3_kernels.runtime import library, versions

_forced: dict[str | None, str] = {}
_record: dict[str, str] | None = None
_announced = False
_by_op: dict[str, "Backends"] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of one op: kernels for its ``autograd.Function``, or a whole function.

    ``why_not`` gets what the op passes to :meth:`Backends.choose` and returns the reason why this
    call cannot run, or None. An op runs ``function`` on its own arguments where there is one, with
    its gradient; else it calls ``forward`` and ``backward``, whose arguments the family documents.
    """

    why_not: Callable[..., str | None]
    forward: Callable | None = None
    backward: Callable | None = None
    function: Callable | None = None


class Backends(dict[str, Backend | str]):
    """The backends of one op by name; a string is the reason why one is not installed.

    Args:
        op: the public name.
        package: where the modules of the backends lie, each with a dict ``BACKENDS`` by op.
        reference: the definition, which runs every call that no other backend takes.
        cpu: names in order of preference for tensors on the CPU.
        cuda: likewise for tensors on a GPU, NVIDIA's or AMD's.
    """

    def __init__(
        self,
        op: str,
        package: str,
        reference: Callable,
        *,
        cpu: tuple[str, ...] = (),
        cuda: tuple[str, ...] = (),
    ) -> None:
        self.op = op
        loaded = {name: _load(op, package, name) for name in dict.fromkeys((*cpu, *cuda))}
        super().__init__(loaded, reference=Backend(_why_not_reference, function=reference))
        self._order: dict[bool, tuple[tuple[str, Backend], ...]] = {}
        for is_cuda, names in ((False, cpu), (True, cuda)):
            present = ((name, loaded[name]) for name in names)
            self._order[is_cuda] = tuple(pair for pair in present if isinstance(pair[1], Backend))
        _by_op[op] = self

    def choose(self, asked: str | None, x: Tensor, *args) -> Backend:
        """Return the backend that runs the op on ``(x, *args)``.

        A backend asked for by name runs or raises: it is never swapped for another. With none
        asked for, the first for the device of ``x`` that takes the call runs, and the reference,
        which takes every call, if no other does.
        """
        if asked is None and _forced:
            asked = _forced.get(self.op) or _forced.get(None)
        if asked is not None:
            return self._named(asked, x, *args)
        name, backend = self._first(x, *args)
        if _record is not None:
            _record[self.op] = name
        return backend

    def _first(self, x: Tensor, *args) -> tuple[str, Backend]:
        for pair in self._order[x.is_cuda]:
            if pair[1].why_not(x, *args) is None:
                return pair
        _announce_missing_library()
        return "reference", self["reference"]

    def _named(self, asked: str, *args) -> Backend:
        if asked not in self:
            raise ValueError(
                f"{self.op}: unknown backend {asked!r}; expected one of {', '.join(self)}"
            )
        backend = self[asked]
        reason = backend if isinstance(backend, str) else backend.why_not(*args)
        if reason is not None:
            raise NotImplementedError(
                f"{self.op}: backend {asked!r} cannot run this call: {reason}"
            )
        if _record is not None:
            _record[self.op] = asked
        return backend

    def add(self, name: str, backend: Backend, *, devices: tuple[str, ...] = ()) -> None:
        """Add a backend of your own; for ``devices`` ("cpu", "cuda") it comes before all others."""
        self[name] = backend
        for device in devices:
            self._order[device == "cuda"] = ((name, backend), *self._order[device == "cuda"])


def _load(op: str, package: str, name: str) -> Backend | str:
    if reason := _why_too_old(name):
        return reason
    try:
        return import_module(f"{package}.{name}").BACKENDS[op]
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("emu3_kernels"):
            raise
        return f"the package {missing.name!r} is not installed"


@cache
def _why_too_old(package: str) -> str | None:
    reason = versions.why_too_old(package)
    if reason is not None:
        warnings.warn(f"emu3_kernels: {reason}; its kernels are left out", stacklevel=2)
    return reason


def _why_not_reference(*_: object) -> None:
    return None


def backends(op: str) -> Backends:
    """Return the backends of ``op`` by name."""
    return _by_op[op]


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
