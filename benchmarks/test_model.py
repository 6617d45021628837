"""One test, one row: a training step of ours beside Hugging Face's, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks import machine, model
from benchmarks.contestants import Case
from benchmarks.duel import interleave
from benchmarks.test_ops import row


@pytest.mark.parametrize("counted", [model.TOKENS, model.TOKENS // 2])
def test_model(counted: int, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    before = machine.load()
    lineup = model.lineup(model.SETTINGS, model.TOKENS, counted)
    seconds = request.config.getoption("--seconds")
    taken = interleave(benchmark, lineup.calls, lineup.seconds, seconds)
    multiply, ours = taken.pop(model.MULTIPLY), taken[model.OURS]
    size = {"tokens": model.TOKENS, "counted": counted}
    case = Case("model", model.OURS, size, torch.bfloat16, "forward+backward")
    benchmark.extra_info.update(row(case, threads, [before, machine.load()], lineup, taken))
    num_flops = model.flops(model.SETTINGS, model.TOKENS, counted)
    benchmark.extra_info["bound"] = model.bound(num_flops, ours, multiply)
    benchmark.extra_info["tokens_per_s"] = model.TOKENS / median(ours)
    num_steps = request.config.getoption("--steps")
    if num_steps and counted == model.TOKENS:
        after = model.after_steps(model.SETTINGS, model.TOKENS, num_steps)
        benchmark.extra_info["after_steps"] = after
