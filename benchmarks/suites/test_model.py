"""One test, one row: our training step beside Hugging Face's, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.entries import Case
from benchmarks.harness.interleave import interleave
from benchmarks.harness.rows import row_of
from benchmarks.suites import model


@pytest.fixture(scope="module")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return machine.gemm_dtypes([torch.bfloat16], request.config.getoption("--device"))[0]


@pytest.fixture(scope="module")
def everyone(dtype: torch.dtype) -> list[model.Trained]:
    return model.trained_models(model.SETTINGS, dtype)


@pytest.mark.parametrize("num_valid", [model.TOKENS, model.TOKENS // 2])
def test_model(
    num_valid: int,
    threads: int,
    everyone: list[model.Trained],
    dtype: torch.dtype,
    benchmark,
    request: pytest.FixtureRequest,
) -> None:
    option, before = request.config.getoption, machine.load()
    device = option("--device")
    timed = model.entries_of(everyone, model.SETTINGS, model.TOKENS, num_valid, device)
    seconds = option("--seconds")
    taken = interleave(benchmark, timed.calls, timed.seconds, seconds, timed.clock)
    size = {"tokens": model.TOKENS, "valid": num_valid}
    case = Case("model", model.OURS, size, dtype, "forward+backward", device)
    bound = model.bound(model.gemm_shapes(model.SETTINGS, model.TOKENS, num_valid), taken)
    loads = [before, machine.load()]
    row = row_of(case, threads, loads, timed, taken, bound)
    for name, standing in [(model.OURS, row), *row["peers"].items()]:
        standing["tokens_per_s"] = model.TOKENS / median(taken[name])
    row["outside_s"] = model.outside(taken)
    del timed
    if (steps := option("--steps")) and num_valid == model.TOKENS:
        tokens = option("--step-tokens") or model.TOKENS
        row["after_steps"] = model.after_steps(everyone, model.SETTINGS, tokens, steps, device)
        loads.append(machine.load())
    benchmark.extra_info.update(row)
