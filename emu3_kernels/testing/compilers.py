"""Fixtures: processes in which Triton compiles while this one interprets, and of another Triton."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch

INSTALLED, OLDEST = "installed", "3.6.0"
"""The Tritons of the gates: the one beside torch, and the oldest that we support."""

COMPILED = "compiled launches"
"""Property of a test: how many launches it has compiled."""


def folder_of(triton: str) -> Path:
    """Return where the Makefile installs ``triton`` for the gates: a folder to put on the path."""
    return Path(sys.prefix, f"triton-{triton}")


@pytest.fixture(scope="session")
def compiling() -> Iterator[Callable]:
    """Call ``compiling(function, *args)`` there, with its result or exception here."""
    with _process() as call:
        yield call


@pytest.fixture(scope="session")
def compiling_with() -> Iterator[Callable]:
    """Call ``compiling_with(triton, function, *args)``: as ``compiling``, with that Triton."""
    with ExitStack() as processes:
        calls: dict[str, Callable] = {}

        def call(triton: str, function: Callable, *args: object) -> object:
            if triton not in calls:
                calls[triton] = processes.enter_context(_process(triton))
            return calls[triton](function, *args)

        yield call


@pytest.fixture(scope="session")
def interpreting_oldest() -> Iterator[Callable]:
    """As ``compiling``, with the interpreter of the oldest Triton."""
    with _process(OLDEST, interpret=True) as call:
        yield call


@pytest.fixture(scope="session")
def emulating() -> Iterator[Callable]:
    """As ``compiling``, for ttsem.

    It makes Triton's printer generic, which no longer takes effect in a process that has compiled
    for every target.
    """
    with _process() as call:
        yield call


@contextmanager
def _process(triton: str = INSTALLED, *, interpret: bool = False) -> Iterator[Callable]:
    """Start a process; it takes over the path and the environment of this one as they are then."""
    path = sys.path if triton == INSTALLED else [str(_installed(triton)), *sys.path]
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare) as pool:
        with mock.patch.dict(os.environ), mock.patch.object(sys, "path", path):
            os.environ.pop("TRITON_INTERPRET", None)
            if interpret:
                os.environ["TRITON_INTERPRET"] = "1"
            pool.submit(int).result()
        yield lambda function, *args: pool.submit(function, *args).result()


def _installed(triton: str) -> Path:
    folder = folder_of(triton)
    if not folder.exists():
        reason = f"triton {triton} is not in {folder}: make test-all installs it"
        required = "triton" in os.environ.get("EMU3_REQUIRE", "")
        (pytest.fail if required else pytest.skip)(reason)
    return folder


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from emu3_kernels.testing.gluon import emulate
        from emu3_kernels.testing.interpreter import improve

        improve()
        emulate()
