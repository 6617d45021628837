"""Jobs of a worker that go wrong, each in its own way."""

import os
import signal
import time
from collections.abc import Iterator


def count(stop: int) -> Iterator:
    for i in range(stop):
        yield f"number {i}"
        yield {"number": i, "process": os.getpid()}


def divide() -> Iterator:
    yield "dividing"
    yield 1 / 0


def die() -> Iterator:
    yield "dying"
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> Iterator:
    yield "hanging"
    time.sleep(60)
