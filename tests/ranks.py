"""Processes of one Gloo group that stay up from test to test."""

import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from emu3_kernels.testing.copies import on_copies


class Ranks:
    """``run`` calls a function on every rank; a rank that fails fails the test, and ends all."""

    def __init__(self, world: int):
        self.world = world
        self.processes: list = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable, *args: object, may_die: int | None = None) -> list:
        """Return ``function(group, *args)`` of every rank; None of the one that may die."""
        self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[Connection, object] = {}
        while waiting := [pipe for pipe in self.pipes if pipe not in results]:
            for pipe in connection.wait(waiting):
                rank = self.pipes.index(pipe)
                try:
                    results[pipe], failure = pipe.recv()
                except EOFError:
                    results[pipe], failure = None, None if rank == may_die else "died"
                if failure:
                    self.close()
                    raise AssertionError(f"rank {rank}: {failure}")
        if may_die is not None:
            self.close()
        return [results[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def _start(self) -> None:
        if self.processes:
            return
        # A fork of a server that has imported torch starts in milliseconds, a spawn in seconds.
        # But CUDA does not work in a fork of a process that has asked for a GPU.
        context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(["tests.conftest", "tests.attention.ring_cases"])
        store = Path(tempfile.mkdtemp(), "store")
        ends = [context.Pipe() for _ in range(self.world)]
        self.pipes = [here for here, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(there, rank, self.world, store), daemon=True)
            for rank, (_, there) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        for _, there in ends:
            there.close()  # else a pipe would outlive its process


def _serve(pipe: Connection, rank: int, world: int, store: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    with on_copies() if torch.cuda.is_available() else nullcontext():
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((function(dist.group.WORLD, *args), None))
            except Exception:  # the test that called shows it
                pipe.send((None, traceback.format_exc()))
