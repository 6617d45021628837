"""``emu3`` as a rank of torchrun that kills itself, by a plan: for each attempt, who, where, when.

torchrun … -m tests.e2e.dying_rank PLAN.json train RECIPE --out RUN
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from emu3 import cli, model
from emu3.train import ranks


class Death(NamedTuple):
    """Of a rank, in an attempt."""

    rank: int
    where: Literal["step", "save", "anywhere"]
    """In the forward pass of a block, in the flush of a checkpoint's file, or after a time."""
    when: float
    """The how-manieth one, from 1, or seconds."""


def write_plan(path: Path, deaths: list[Death]) -> None:
    path.write_text(json.dumps(deaths))


def _die_as_planned(deaths: list[Death]) -> None:
    if ranks.restarts() >= len(deaths):
        return
    death = Death(*deaths[ranks.restarts()])
    if death.rank != int(os.environ["RANK"]):
        return
    if death.where == "anywhere":
        threading.Thread(target=_die_after, args=(death.when,), daemon=True).start()
        return
    owner, name = {"step": (model.Block, "forward"), "save": (os, "fsync")}[death.where]
    setattr(owner, name, _dying(getattr(owner, name), death.when))


def _dying(function: Callable, when: float) -> Callable:
    calls = 0

    def call(*args, **settings):
        nonlocal calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **settings)

    return call


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _die_as_planned(json.loads(Path(sys.argv[1]).read_text()))
    cli.app(sys.argv[2:], prog_name="emu3")
