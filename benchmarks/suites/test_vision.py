"""One test, one row: an image through our tokenizer and Hugging Face's, interleaved."""

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.entries import Case
from benchmarks.harness.interleave import interleave
from benchmarks.harness.rows import row_of
from benchmarks.suites import vision
from emu3.config import VisionSettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision(
    dtype: torch.dtype, threads: int, benchmark, request: pytest.FixtureRequest
) -> None:
    option, before = request.config.getoption, machine.load()
    device = option("--device")
    if dtype not in machine.gemm_dtypes([dtype], device):
        pytest.skip(f"a GEMM of PyTorch in {dtype} takes minutes without AVX-512")
    timed = vision.entries_of(VisionSettings(), vision.SIDE, dtype, device)
    seconds = option("--seconds")
    taken = interleave(benchmark, timed.calls, timed.seconds, seconds, timed.clock)
    if dtype == torch.float32 and vision.THEIRS in timed.calls:
        assert vision.agreement(timed.results) >= vision.SAME_CODES
    size = {"batch": 1, "height": vision.SIDE, "width": vision.SIDE}
    case = Case("vision", vision.OURS, size, dtype, vision.DIRECTION, device)
    loads = [before, machine.load()]
    benchmark.extra_info.update(row_of(case, threads, loads, timed, taken, bound=None))
