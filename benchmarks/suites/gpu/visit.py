"""A visit to a GPU: first every item is prepared in parallel, then timed one by one, in time.

An item that fails is named and the next one runs; every row is stored when it is measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue

from benchmarks.harness import results
from benchmarks.harness.results import NOT_TIMED
from benchmarks.harness.worker import JobError, Worker
from benchmarks.suites.gpu.plan import Item
from benchmarks.suites.gpu.rows import ENTRY

PREPARING = 0.4
"""Share of the time in which items are compiled and checked; what is not ready is left out."""
LONGEST = 150.0
"""Seconds of one item's compilation and checks."""
REPORT = 15.0
"""Seconds kept for the page and its charts."""
PATIENCE = 6.0
"""An item that takes so many times its cost hangs."""
MOST_SKIPPED = 3
"""Entries of one item that may kill its process before the item is given up."""
OUT_OF_MEMORY = "OutOfMemoryError"


@dataclass
class Visit:
    """What is asked for, and what has come of it so far."""

    items: Sequence[Item]
    device: str
    seconds: float
    path: Path
    made: dict
    """Machine, commit and versions, the same of every row."""
    say: Callable[[str], None]
    show: Callable[[dict], None]
    """Called with every row as it is stored."""
    start: float = field(default_factory=time.monotonic)
    prepared: dict[Item, dict] = field(default_factory=dict)
    failed: dict[Item, str] = field(default_factory=dict)
    left_out: dict[Item, str] = field(default_factory=dict)

    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def store(self, *rows: dict) -> None:
        results.store(self.path, [row | self.made for row in rows])

    def run(self, num_workers: int) -> None:
        """Prepare and time everything that fits; leave no process behind."""
        stored = [row for row in results.read(self.path) if row.get("suite") != NOT_TIMED]
        results.write(self.path, results.lines(stored))
        workers = [Worker() for _ in range(num_workers)]
        try:
            self._prepare(workers)
            for worker in workers[1:]:
                worker.close()
            self._measure(workers[0])
        finally:
            for worker in workers:
                worker.close()
            self.store(*map(not_timed, [*self.failed, *self.left_out], self._reasons()))

    def _reasons(self) -> list[str]:
        return [*self.failed.values(), *self.left_out.values()]

    def _prepare(self, workers: list[Worker]) -> None:
        """Prepare every item, one process a worker; what ran out of memory is tried again alone."""
        end = time.monotonic() + PREPARING * self.seconds
        self._prepare_these(list(self.items), workers, end)
        again = [item for item, why in self.failed.items() if OUT_OF_MEMORY in why]
        if len(workers) > 1 and again:
            for worker in workers[1:]:
                worker.close()
            for item in again:
                del self.failed[item]
            self._prepare_these(again, workers[:1], end)
        for item in self.items:
            if item not in self.prepared and item not in self.failed:
                self.left_out[item] = "not compiled and checked in time"

    def _prepare_these(self, items: list[Item], workers: list[Worker], end: float) -> None:
        queue: SimpleQueue[Item] = SimpleQueue()
        for item in items:
            queue.put(item)

        def serve(worker: Worker) -> None:
            while (seconds := end - time.monotonic()) > 0:
                try:
                    item = queue.get_nowait()
                except Empty:
                    return
                self._prepare_one(item, worker, min(LONGEST, seconds))

        with ThreadPoolExecutor(len(workers)) as threads:
            try:
                list(threads.map(serve, workers))
            except BaseException:  # as Ctrl-C: no thread may wait for its process
                for worker in workers:
                    worker.close()
                raise

    def _prepare_one(self, item: Item, worker: Worker, seconds: float) -> None:
        start = time.monotonic()
        try:
            (self.prepared[item],) = retried(item, "prepare", worker, self.device, {}, seconds)
        except JobError as error:
            self.failed[item] = f"{error.step}: {error}"
            self.say(f"FAILED {item}: {self.failed[item]}")
        else:
            self.say(f"ready  {item} ({time.monotonic() - start:.1f} s)")

    def _measure(self, worker: Worker) -> None:
        for item in [item for item in self.items if item in self.prepared]:
            room = self.left() - REPORT
            if item.cost > room:
                self.left_out[item] = f"it takes {item.cost:.0f} s, {max(room, 0):.0f} s were left"
                self.say(f"left out {item}: {self.left_out[item]}")
                continue
            start, limit = time.monotonic(), min(room, PATIENCE * item.cost)
            given = self.prepared[item]
            try:
                for row in retried(item, "measure", worker, self.device, given, limit):
                    self.store(row)
                    self.show(row)
            except JobError as error:
                self.failed[item] = f"{error.step}: {error}"
                self.say(f"FAILED {item}: {self.failed[item]}")
            else:
                self.say(f"timed  {item} ({time.monotonic() - start:.1f} s)")


def retried(
    item: Item, job: str, worker: Worker, device: str, given: dict, seconds: float
) -> Iterator[dict]:
    """Yield the results of a job; an entry that kills its process is left out of the next try."""
    module = import_module(f"benchmarks.suites.gpu.{item.kind}")
    skipped = given.get("missing", {}) if job == "measure" else {}
    for tries in range(MOST_SKIPPED + 1):
        asked = given | {"missing": skipped} if job == "measure" else skipped
        try:
            yield from worker.run(getattr(module, job), item, device, asked, seconds=seconds)
            return
        except JobError as error:
            name = error.step.removeprefix(ENTRY)
            if name == error.step or name in skipped or tries == MOST_SKIPPED:
                raise
            skipped = skipped | {name: str(error)}


def not_timed(item: Item, why: str) -> dict:
    """Return the row that says why there is none."""
    return {
        "label": NOT_TIMED,
        "suite": NOT_TIMED,
        "op": item.op,
        "backend": "",
        "device": "cpu" if item.dry else "cuda",
        "size": dict(item.size),
        "dtype": str(item.dtype).removeprefix("torch."),
        "direction": ", ".join(item.directions),
        "threads": None,
        "why": why,
        "peers": {},
        "missing": {},
    }
