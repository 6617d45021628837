"""A process that runs jobs one by one: what kills or hangs it costs one job, not the run.

A job is a generator of a module. It yields strings, the name of the step that comes next, and
results of any other type. A GPU that has failed an assertion refuses all later work of its process,
so the process ends then, and the next job starts another.
"""

import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch


class JobError(RuntimeError):
    """A job raised, died or took too long; ``step`` is what it was doing."""

    def __init__(self, step: str, what: str, died: bool) -> None:
        super().__init__(what)
        self.step, self.died = step, died


class Worker:
    """A process that is started by its first job, and again after one that killed it."""

    def __init__(self) -> None:
        self._process, self._pipe = None, None

    def run(self, job: Callable, *args: object, seconds: float) -> Iterator[object]:
        """Yield the results of ``job(*args)``.

        Args:
            job: a generator function of a module; it and ``args`` are pickled.
            seconds: limit, the start of the process not included.

        Raises:
            JobError: the job raised, its process died, or the limit passed; it is killed then.
        """
        self._start()
        self._pipe.send((job, args))
        step, end = "start", time.monotonic() + seconds
        while True:
            if not self._pipe.poll(max(0.0, end - time.monotonic())):
                self.close()
                raise JobError(step, f"took over {seconds:.0f} s", died=True)
            try:
                kind, value = self._pipe.recv()
            except EOFError:
                raise JobError(step, f"its process ended: {self._ended()}", died=True) from None
            if kind == "step":
                step = value
            elif kind == "result":
                yield value
            elif kind == "error":
                raise JobError(step, value, died=False)
            else:
                return

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._pipe.recv()
        except EOFError:
            raise JobError("start", f"its process ended: {self._ended()}", died=True) from None

    def _ended(self) -> str:
        self._process.join()
        code = self._process.exitcode
        self.close()
        return f"signal {-code}" if code < 0 else f"status {code}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection) -> None:
    pipe.send(("ready", None))
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            for value in job(*args):
                pipe.send(("step" if isinstance(value, str) else "result", value))
            pipe.send(("done", None))
        except Exception as error:
            pipe.send(("error", first_line(error)))
            if gpu_is_lost():
                return


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def gpu_is_lost() -> bool:
    """Say whether this process can no longer use its GPU, as after a device-side assertion."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
