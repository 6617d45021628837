"""Set before anything imports triton: the interpreter where there is no GPU, and NaN poison."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.empty now returns NaN: a kernel that leaves an element unwritten fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)
# A worker for each core is faster than threads; processes that a test starts follow.
torch.set_num_threads(1)
# The budget of a convolution in float32 is that of float32 on a GPU too.
torch.backends.cudnn.allow_tf32 = False
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from importlib.util import find_spec  # noqa: E402

import pytest  # noqa: E402

from emu3_kernels.testing.compilers import (  # noqa: E402, F401
    COMPILED,
    compiling,
    compiling_with,
    emulating,
    interpreting_oldest,
)
from emu3_kernels.testing.copies import on_copies  # noqa: E402
from emu3_kernels.testing.suite import is_lower_level  # noqa: E402
from tests.unchanged import FAMILIES, Unchanged, families_of, params_of  # noqa: E402

QUICK = {"test_config.py", "test_dispatch.py", "test_layers.py", "test_prompt.py"}
"""Files that ``make check`` runs beside every test that is marked so."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", choices=FAMILIES, help="Run the tests of one family of ops.")
    parser.addoption(
        "--skip-unchanged",
        action="store_true",
        help="Leave out tests of ops that passed before on the same sources.",
    )
    parser.addoption(
        "--on-copies",
        action="store_true",
        help="Run GPU backends on copies of the tensors of a test, as on a machine with a GPU.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--skip-unchanged"):
        config.pluginmanager.register(Unchanged())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.getreports("passed")
    compiled = sum(n for report in passed for name, n in report.user_properties if name == COMPILED)
    if compiled:
        terminalreporter.write_line(f"{compiled} compiled launches keep their contracts")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is told by a parameter, a fixture or a file; leave one family if asked to."""
    for item in items:
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.check)
        if "ranks" in item.fixturenames:
            item.add_marker(pytest.mark.distributed)
        if any(_is_lower_level(value) for value in params_of(item)):
            item.add_marker(pytest.mark.levels)
    if family := config.getoption("--family"):
        others = [item for item in items if family not in families_of(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if family in families_of(item)]


def _is_lower_level(value: object) -> bool:
    return isinstance(value, str) and (is_lower_level(value) or is_lower_level(f"cpu@{value}"))


@pytest.fixture(scope="session", autouse=True)
def improved_interpreter() -> None:
    if find_spec("triton"):
        from emu3_kernels.testing.interpreter import improve

        improve()
        if os.environ.get("TRITON_INTERPRET") == "1":
            from emu3_kernels.testing.gluon import emulate

            emulate()


@pytest.fixture(scope="session", autouse=True)
def gpu_backends(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run GPU backends where they can run, whatever device the tensors of a test are on."""
    if torch.cuda.is_available():
        where = on_copies()
    elif request.config.getoption("--on-copies"):
        where = on_copies("cpu")
    else:
        where = nullcontext()
    with where:
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
