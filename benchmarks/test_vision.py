"""One test, one row: a picture through our tokenizer and Hugging Face's, in interleaved rounds."""

import pytest
import torch

from benchmarks import machine, vision
from benchmarks.contestants import Case
from benchmarks.duel import interleave
from benchmarks.test_ops import row
from emu3.config import VisionSettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision(
    dtype: torch.dtype, threads: int, benchmark, request: pytest.FixtureRequest
) -> None:
    asked, before = request.config.getoption, machine.load()
    device = asked("--device")
    if dtype not in machine.multiplied_in([dtype], device):
        pytest.skip(f"PyTorch takes minutes to multiply {dtype} without AVX-512")
    lineup = vision.lineup(VisionSettings(), vision.PICTURE, dtype, device)
    taken = interleave(benchmark, lineup.calls, lineup.seconds, asked("--seconds"), lineup.clock)
    if dtype == torch.float32 and vision.THEIRS in lineup.calls:
        assert vision.agreement(lineup.results) >= vision.SAME_CODES
    size = {"batch": 1, "height": vision.PICTURE, "width": vision.PICTURE}
    case = Case("vision", vision.OURS, size, dtype, vision.DIRECTION, device)
    loads = [before, machine.load()]
    benchmark.extra_info.update(row(case, threads, loads, lineup, taken, bound=None))
