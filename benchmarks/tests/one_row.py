"""A case of swiglu, and the row of a run that timed it."""

import torch

from benchmarks.harness import bounds, machine
from benchmarks.harness.bounds import COPY, READ
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.rows import row_of

CASE = Case("swiglu", "cpu", {"num_rows": 3, "width": 40}, torch.bfloat16, "forward")
IN_BFLOAT16 = {"dtype": torch.bfloat16, "device": "cpu"}


def row() -> dict:
    timed = Entries(peak_mib={"cpu": 1.5, "eager": 2.5, READ: 0.0, COPY: 0.0})
    timed.missing["vLLM"] = "not installed"
    taken = {"cpu": [2.0, 4.0], "eager": [6.0, 8.0], READ: [1.0, 3.0], COPY: [4.0, 4.0]}
    return row_of(CASE, 1, [0.5, 1.0], timed, taken, bounds.bound(CASE, taken))


def session(*rows: dict) -> dict:
    """What pytest-benchmark writes of a session."""
    made = {"machine_info": machine.facts(), "commit_info": machine.commit()}
    benchmarks = [{"extra_info": row} for row in rows]
    return made | {"datetime": "2000-01-02T03:04:05", "benchmarks": benchmarks}
