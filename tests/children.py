"""Processes that a test may kill or limit, forked from a server that has imported torch."""

from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch


def start(function: Callable, *args: object) -> tuple[BaseProcess, Connection]:
    """Call ``function(*args)`` in a new process; its result comes through the connection.

    Of an iterator every element comes, as soon as there is one.
    """
    # A fork of a server that has imported torch starts in milliseconds, a spawn in seconds.
    context = get_context("forkserver")
    needed = ["tests.conftest", "tests.attention.ring_cases", "emu3.cli", "torch._dynamo"]
    context.set_forkserver_preload(needed)  # an optimizer imports torch._dynamo at its first step
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(there, function, args), daemon=True)
    process.start()
    there.close()
    return process, here


def run(function: Callable, *args: object) -> object:
    """Return what ``function(*args)`` returns in a process of its own."""
    process, pipe = start(function, *args)
    result = pipe.recv()
    process.join()
    return result


def exit_code(function: Callable, *args: object) -> int:
    """Return the exit code of a process that calls ``function(*args)``; negative for a signal."""
    process, _ = start(function, *args)
    process.join()
    return process.exitcode


def _call(pipe: Connection, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    result = function(*args)
    for part in result if isinstance(result, Iterator) else (result,):
        pipe.send(part)
