"""Options and facts of a timed session; ``python -m benchmarks`` passes them."""

import pytest
import torch

from benchmarks.harness import entries, machine
from benchmarks.harness.run import WHOLE
from emu3_kernels.ops import OPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", action="append", choices=(*OPS, *WHOLE), help="Ops.")
    parser.addoption("--threads", type=int, action="append", help="Threads of every entry.")
    parser.addoption("--seconds", type=float, default=2.0, help="Limit of all rounds of a row.")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="Where to time.")
    parser.addoption("--scale", action="store_true", help="Time the sizes of scale too.")
    parser.addoption("--steps", type=int, default=0, help="Train the models this long too.")
    parser.addoption("--step-tokens", type=int, default=0, help="Tokens of a training step.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    counts = sorted(option("--threads") or [1], reverse=True)  # the reference runs on most
    if "case" not in metafunc.fixturenames:
        metafunc.parametrize("threads", counts, indirect=True)
        return
    found = [
        (case, count)
        for op in option("--op") or OPS
        for case in entries.cases_of(op, option("--device"), option("--scale"))
        for count in (counts[:1] if entries.is_scaling(case) else counts)
    ]
    ids = [f"{case}-{count}" for case, count in found]
    metafunc.parametrize(("case", "threads"), found, ids=ids, indirect=["threads"])


def pytest_benchmark_generate_machine_info() -> dict:
    return machine.facts()


def pytest_benchmark_generate_commit_info() -> dict:
    return machine.commit()


def pytest_benchmark_update_json(output_json: dict) -> None:
    for timed in output_json["benchmarks"]:
        timed["params"] = {"case": timed["param"]}  # a Case is no JSON, its name is


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    """Set the threads of torch and of the code that it compiles."""
    count = request.param
    machine.prepare(count)
    torch.compiler.reset()
    torch._inductor.config.cpp.threads = count
    # Processes of the compiler would be load: compile here, before the timing.
    torch._inductor.config.compile_threads = 1
    # A backward pass is timed more than once: it may not overwrite what forward saved.
    torch._functorch.config.donated_buffer = False
    return count
