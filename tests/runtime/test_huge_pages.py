"""Large results, and the memory that a caller names, are backed by pages of 2 MiB."""

import re
from pathlib import Path

import pytest
import torch

from emu3.cache import KeyValueCache
from emu3.config import PRESETS
from emu3_kernels import swiglu
from emu3_kernels.runtime import library
from emu3_kernels.runtime.library import advise_huge_pages

MAPS = Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(bool(library.MISSING), reason=str(library.MISSING)),
    pytest.mark.skipif(not MAPS.exists(), reason="only Linux reports the advice"),
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has none"
    ),
]
MIB = 1 << 20


def advised(tensor: torch.Tensor) -> bool:
    """Whether huge pages were advised for the middle of ``tensor``."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    found = False
    for line in MAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no map holds the tensor")


def test_a_large_result():
    gate, up = torch.randn(2, 16 * MIB // 4)[:, None]
    assert advised(swiglu(gate, up, backend="cpu"))


def test_a_cache():
    cache = KeyValueCache(PRESETS["mini"], batch=1, capacity=16384, dtype=torch.float32)
    assert advised(cache.keys)
    assert advised(cache.values)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_a_view_with_gaps_raises():
    with pytest.raises(ValueError, match=r"expected a contiguous tensor, got \(4, 2\)"):
        advise_huge_pages(torch.zeros(2, 4)[:, ::2])


@pytest.mark.parametrize("num_bytes", [0, 1, 4 * MIB - 1])
def test_small_memory_stays_as_it_is(num_bytes):
    small = torch.arange(num_bytes, dtype=torch.uint8)
    assert advise_huge_pages(small) is small
    assert torch.equal(small, torch.arange(num_bytes, dtype=torch.uint8))
