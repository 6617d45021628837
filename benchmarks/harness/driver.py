"""Times saved calls in another tree: ``python driver.py TREE CALLS RESULT``.

Runs in its own process. ``emu3_kernels`` is imported from TREE and only its public functions are
called; the rest is imported from the tree of this file.
"""

import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
MIN_SAMPLES = 3


def import_op_library(tree: str) -> ModuleType:
    """Import ``emu3_kernels`` of ``tree``; every later import is from ``ROOT``."""
    sys.path[0] = tree
    import emu3_kernels

    if Path(emu3_kernels.__file__).parents[1] != Path(tree).resolve():
        raise SystemExit(f"driver: emu3_kernels must come from {tree}, got {emu3_kernels.__file__}")
    sys.path[0] = str(ROOT)
    return emu3_kernels


def time_calls(library: ModuleType, calls: dict) -> dict[str, float | str]:
    """Return milliseconds by row, or the reason why a row cannot run."""
    import torch

    from benchmarks.harness import machine

    machine.prepare(calls["threads"])
    timed: dict[str, float | str] = {}
    for name, call in calls["rows"].items():
        inputs = torch.load(call["inputs"], map_location=calls["device"])
        try:
            timed[name] = 1e3 * time_call(library, call, inputs, calls)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            timed[name] = f"{type(error).__name__}: {error}"
    return timed


def time_call(library: ModuleType, call: dict, inputs: dict, calls: dict) -> float:
    """Return the median seconds of one call."""
    import torch

    from benchmarks.harness.calls import WITHOUT_GRADIENT, bind, estimate
    from benchmarks.harness.clock import of

    clock, function = of(calls["device"]), getattr(library, call["op"])
    if backend := calls["backend"]:
        function = partial(function, backend=backend)
    with torch.set_grad_enabled(call["direction"] not in WITHOUT_GRADIENT):
        bound = bind(function, inputs, call["direction"], call["leaves"])
        bound()
        once = estimate(bound, clock)
        repeats = max(1, round(clock.min_sample / once))
        samples = []
        while len(samples) < MIN_SAMPLES or once * repeats * len(samples) < calls["seconds"]:
            clock.rest()
            samples.append(clock.seconds(bound, repeats) / repeats)
    return median(samples)


def main(tree: str, calls: str, result: str) -> None:
    library = import_op_library(tree)
    timed = time_calls(library, json.loads(Path(calls).read_text()))
    Path(result).write_text(json.dumps(timed))


if __name__ == "__main__":
    main(*sys.argv[1:])
