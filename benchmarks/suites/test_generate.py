"""One test, one row: a guided image of ours beside Hugging Face's, in interleaved rounds."""

from statistics import median

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.entries import Case
from benchmarks.harness.interleave import interleave
from benchmarks.harness.rows import row_of
from benchmarks.suites import generate, model
from emu3.text import QwenTokenizer


def test_generate(threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    option, before = request.config.getoption, machine.load()
    device = option("--device")
    dtype = machine.gemm_dtypes([torch.bfloat16], device)[0]
    ours, theirs, _ = model.trained_models(model.SETTINGS, dtype)
    timed = generate.entries_of(ours.model, theirs.model, QwenTokenizer(), device=device)
    taken = interleave(benchmark, timed.calls, timed.seconds, option("--seconds"), timed.clock)
    height, width = generate.GRID
    size = {"height": height, "width": width, "guidance": 3.0}
    case = Case("generate", generate.OURS, size, dtype, generate.DIRECTION, device)
    row = row_of(case, threads, [before, machine.load()], timed, taken, bound=None)
    for name, standing in [(generate.OURS, row), *row["peers"].items()]:
        if name in taken:
            standing["tokens_per_s"] = height * (width + 1) / median(taken[name])
    benchmark.extra_info.update(row)
