"""Fixtures: processes in which Triton compiles, since this one interprets where there is no GPU."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock

import pytest
import torch


@pytest.fixture(scope="session")
def compiling() -> Iterator[Callable]:
    """Call ``compiling(function, *args)`` there, with its result or exception here."""
    with _process() as call:
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
def _process() -> Iterator[Callable]:
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare) as pool:
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)
            pool.submit(int).result()
        yield lambda function, *args: pool.submit(function, *args).result()


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
