"""``--skip-unchanged``: leave out tests that passed before on the same sources.

A family imports :mod:`emu3_kernels.runtime` alone, and its tests import no other family
(``tests/test_layers.py``). So an edit of one kernel concerns the tests of one family, and those of
the others that passed need not run again until a source, the compiled library or an installed
package changes. Files, training and the server, without a GPU, run no Triton kernel: an edit of one
does not concern their tests either. ``make test-all`` runs every test.
"""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

from emu3_kernels.ops import OPS
from emu3_kernels.runtime import library
from emu3_kernels.testing.cache import folder

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(set(OPS.values()))
SHARED_TESTS = "gates"
"""Folder of the tests that walk every op."""
STACK = "stack"
"""The group of tests of ``emu3`` that run no Triton kernel without a GPU, and none of them names
one (``tests/test_layers.py``)."""
STACK_TESTS = "media", "serve", "train"
KINDS = {".py", ".toml", ".so", ".cpp", ".h", ".cuh", ".cu"}


class Unchanged:
    """Deselects the tests that passed before; the process that reports keeps those that pass."""

    def __init__(self) -> None:
        _machine()  # before collection: test modules may change the path to packages
        self.left_out = 0
        self.passed: dict[str, set[str]] = defaultdict(set)
        self.failed: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        known = {family: passed_before(family) for family in (*FAMILIES, STACK)}
        kept, left_out = [], []
        for item in items:
            family = family_of(item)
            if family:
                item.user_properties.append(("family", family))
            (left_out if item.nodeid in known.get(family, ()) else kept).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:], self.left_out = kept, len(left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        family = dict(report.user_properties).get("family")
        if family and report.when == "call" and report.passed:
            self.passed[family].add(report.nodeid)
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            session.config.workeroutput["left_out"] = self.left_out
            return
        for family, passed in self.passed.items():
            keep(family, passed - self.failed)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.left_out = getattr(node, "workeroutput", {}).get("left_out", 0)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.left_out:
            terminalreporter.write_line(
                f"{self.left_out} tests passed before on the same sources and were left out"
            )


def family_of(item: pytest.Item) -> str | None:
    """Return the one family whose sources decide the outcome of ``item``; None if there is none."""
    families = families_of(item)
    where = item.path.relative_to(ROOT).parts[1]
    if where in STACK_TESTS and not torch.cuda.is_available():
        return STACK
    return families.pop() if len(families) == 1 and {where} <= {SHARED_TESTS, *FAMILIES} else None


def families_of(item: pytest.Item) -> set[str]:
    """Return the families of the folder and of the parameters of ``item``."""
    where = item.path.relative_to(ROOT).parts[1]
    ops = {value for value in params_of(item) if isinstance(value, str) and value in OPS}
    return {OPS[op] for op in ops} | {where} & {*FAMILIES}


def params_of(item: pytest.Item) -> list:
    return [*item.callspec.params.values()] if hasattr(item, "callspec") else []


def passed_before(family: str) -> set[str]:
    """Return the tests of ``family`` that passed on the sources as they are."""
    with suppress(OSError, ValueError):
        stored = json.loads(_path(family).read_text())
        if stored["sources"] == digest(family, ROOT):
            return set(stored["passed"])
    return set()


def keep(family: str, passed: set[str]) -> None:
    known = {"sources": digest(family, ROOT), "passed": sorted(passed_before(family) | passed)}
    with suppress(OSError):
        draft = _path(family).with_suffix(f".{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known))
        os.replace(draft, _path(family))


def _path(family: str) -> Path:
    return folder() / "passed" / f"{family}.json"


@cache
def digest(family: str, root: Path) -> str:
    """Return the SHA-256 of all that the tests of ``family`` depend on."""
    digest = sha256(_machine().encode())
    for path in sorted(sources(family, root)):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def sources(family: str, root: Path) -> Iterator[Path]:
    """Yield the files of the library and of its tests, without those of other families."""
    if family == STACK:
        yield from _sources_of_the_stack(root)
        return
    elsewhere = {*FAMILIES} - {family}
    tops = "emu3_kernels", "csrc", f"tests/{SHARED_TESTS}", f"tests/{family}"
    for path in [path for top in tops for path in (root / top).rglob("*")]:
        if path.suffix in KINDS and not elsewhere & {*path.relative_to(root).parts, path.stem}:
            yield path
    yield from (root / "tests").glob("*.py")
    yield root / "pyproject.toml"


def _sources_of_the_stack(root: Path) -> Iterator[Path]:
    tops = "emu3", "emu3_kernels", "csrc", *(f"tests/{folder}" for folder in STACK_TESTS)
    for path in [path for top in tops for path in (root / top).rglob("*")]:
        is_kernel = path.match("emu3_kernels/ops/*/*triton*.py")
        if path.is_file() and path.suffix != ".pyc" and not is_kernel:
            yield path
    yield from (root / "tests").glob("*.py")
    yield root / "pyproject.toml"


@cache
def _machine() -> str:
    packages = sorted(f"{d.name} {d.version}" for d in distributions())
    levels = () if library.MISSING else library.cpu_levels()
    required = os.environ.get("EMU3_REQUIRE", "")
    return "\n".join([platform.python_version(), platform.machine(), *levels, required, *packages])
