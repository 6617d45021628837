"""One thread that owns the model: it admits jobs to the batch, steps it and tells of results."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from typing_extensions import Self

from emu3.generate import Batch, Generation

_LOG = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """The queue is full."""


class DrainingError(RuntimeError):
    """The server is about to stop."""


class Job:
    """What one request generates, and an asynchronous iterator over its events.

    Leaving ``async with`` cancels what has not been generated yet. The methods without ``async``
    are called by the engine's thread.
    """

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        """Rows of the batch that one of its generations takes."""
        self.cancelled = False
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def prepare(self) -> Sequence[Generation]:
        """What is to be generated; may run the vision tokenizer."""
        raise NotImplementedError

    def grown(self, generation: Generation, batch: Batch) -> None:
        """A generation has a new code or token."""
        raise NotImplementedError

    def ended(self, generation: Generation) -> None:
        """A generation has ended without error."""
        raise NotImplementedError

    def tell(self, event: Any) -> None:
        """Pass on an event, an exception, or None at the end; a loop that is closed has no need."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancelled = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event


class Engine:
    """Decodes jobs together; those that wait are admitted in their order when rows are free.

    Args:
        batch: whose rows they share.
        max_queue: jobs that wait, at most.
    """

    def __init__(self, batch: Batch, max_queue: int) -> None:
        self.batch, self.max_queue = batch, max_queue
        self.forwards = self.rows = 0
        """Steps of the batch so far, and the rows of all of them together."""
        self._waiting: deque[Job] = deque()
        self._left: dict[Job, deque[Generation]] = {}
        """Of jobs that were begun: generations that have not joined yet."""
        self._running: dict[Generation, Job] = {}
        self._work = threading.Condition()
        self._stopping = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="emu3-engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def stopping(self) -> bool:
        """Whether no further job is taken."""
        return self._stopping or not self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self) -> None:
        self._thread.start()

    def check_open(self) -> None:
        """Raise unless a job is taken now.

        Raises:
            BusyError: ``max_queue`` jobs wait.
            DrainingError: the engine is to stop.
        """
        if self.stopping:
            raise DrainingError("the server is about to stop")
        if len(self._waiting) >= self.max_queue:
            raise BusyError(f"the queue is full: {self.max_queue} requests wait")

    def submit(self, job: Job) -> None:
        """Queue a job; the errors are those of :meth:`check_open`."""
        with self._work:
            self.check_open()
            self._waiting.append(job)
            self._work.notify()

    def drain(self) -> None:
        """Take no further jobs; the thread ends after those it has."""
        with self._work:
            self._stopping = True
            self._work.notify()

    def abort(self) -> None:
        """End at once; jobs that are left get :class:`DrainingError`."""
        self._aborting = True
        self.drain()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._cancel()
                self._admit()
                if self.batch.generations:
                    self._step()
            except Exception as error:  # of the model or the device: the requests fail, no other
                _LOG.exception("a step failed")
                self._fail_all(error)
        self._fail_all(DrainingError("the server was stopped"))

    def _wait_for_work(self) -> bool:
        with self._work:
            while not (self._waiting or self._left or self._running):
                if self._stopping:
                    return False
                self._work.wait()
        return not self._aborting

    def _cancel(self) -> None:
        """Let generations of clients that have left go."""
        for generation, job in [*self._running.items()]:
            if job.cancelled:
                self.batch.leave(generation)
                del self._running[generation]
        for job in [job for job in self._left if job.cancelled]:
            del self._left[job]
        with self._work:
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def _admit(self) -> None:
        """Let generations join, in the order of their jobs, while rows are free.

        Images that join together share the forward of their prompts; a text, whose prompt may be
        longer by far, has its own.
        """
        images: list[Generation] = []
        free = self.batch.free_rows
        for job, generation in self._next(free):
            self._running[generation] = job
            if generation.grid is None:
                self._joined([generation])
            else:
                images.append(generation)
        if images:
            self._joined(images)

    def _next(self, free: int) -> Iterator[tuple[Job, Generation]]:
        """Generations, of the job that came first first, that fit in ``free`` rows."""
        while job := self._first(free):
            left = self._left[job]
            while left and job.num_prompts <= free:
                free -= job.num_prompts
                yield job, left.popleft()
            if left:
                return
            del self._left[job]

    def _first(self, free: int) -> Job | None:
        """The first job with generations to join, begun if it was not; None if rows lack."""
        while not self._left:
            with self._work:
                if not self._waiting or self._waiting[0].num_prompts > free:
                    return None
                job = self._waiting.popleft()
            if generations := self._guarded(job, job.prepare):
                self._left[job] = deque(generations)
        job = next(iter(self._left))
        return job if job.num_prompts <= free else None

    def _joined(self, generations: list[Generation]) -> None:
        self._tell(self.batch.join(generations), generations)

    def _step(self) -> None:
        stepped = [*self.batch.generations]
        self.forwards += 1
        self.rows += sum(len(one.prompts) for one in stepped)
        self._tell(self.batch.step(), stepped)

    def _tell(self, ended: list[Generation], stepped: list[Generation]) -> None:
        for one in stepped:
            if one not in ended:
                job = self._running[one]
                self._guarded(job, job.grown, one, self.batch)
        for one in ended:
            job = self._running.pop(one)
            self._guarded(job, self._finish, job, one)

    def _finish(self, job: Job, generation: Generation) -> None:
        if generation.error:
            raise RuntimeError(str(generation.error))
        job.ended(generation)
        if not self._left.get(job) and job not in self._running.values():
            job.tell(None)

    def _guarded(self, job: Job, call: Callable[..., Any], *args: Any) -> Any:
        """Call a part of ``job``, whose errors are its own alone."""
        try:
            return call(*args)
        except Exception as error:
            if not isinstance(error, ValueError):
                _LOG.exception("a request failed")
            job.tell(error)
            job.cancelled = True
            return None

    def _fail_all(self, error: Exception) -> None:
        with self._work:
            jobs = {*self._running.values(), *self._left}
            if self._aborting:
                jobs |= {*self._waiting}
                self._waiting.clear()
        for job in jobs:
            job.tell(error)
        self._running.clear()
        self._left.clear()
        for one in [*self.batch.generations]:
            self.batch.leave(one)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
