"""One test, one row: a training step of ours beside Hugging Face's, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks import machine, model
from benchmarks.contestants import Case
from benchmarks.duel import interleave
from benchmarks.test_ops import row


@pytest.fixture(scope="module")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return machine.multiplied_in([torch.bfloat16], request.config.getoption("--device"))[0]


@pytest.fixture(scope="module")
def everyone(dtype: torch.dtype) -> list[model.Entrant]:
    return model.entrants(model.SETTINGS, dtype)


@pytest.mark.parametrize("counted", [model.TOKENS, model.TOKENS // 2])
def test_model(
    counted: int,
    threads: int,
    everyone: list[model.Entrant],
    dtype: torch.dtype,
    benchmark,
    request: pytest.FixtureRequest,
) -> None:
    asked, before = request.config.getoption, machine.load()
    device = asked("--device")
    lineup = model.lineup(everyone, model.SETTINGS, model.TOKENS, counted, device)
    taken = interleave(benchmark, lineup.calls, lineup.seconds, asked("--seconds"), lineup.clock)
    size = {"tokens": model.TOKENS, "counted": counted}
    case = Case("model", model.OURS, size, dtype, "forward+backward", device)
    bound = model.bound(model.matrices(model.SETTINGS, model.TOKENS, counted), taken)
    loads = [before, machine.load()]
    written = row(case, threads, loads, lineup, taken, bound)
    for name, standing in [(model.OURS, written), *written["peers"].items()]:
        standing["tokens_per_s"] = model.TOKENS / median(taken[name])
    written["outside_s"] = model.outside(taken)
    del lineup
    if (steps := asked("--steps")) and counted == model.TOKENS:
        tokens = asked("--step-tokens") or model.TOKENS
        trained = model.after_steps(everyone, model.SETTINGS, tokens, steps, device)
        written["after_steps"] = trained
        loads.append(machine.load())
    benchmark.extra_info.update(written)
