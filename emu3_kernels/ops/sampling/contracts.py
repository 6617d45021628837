"""The compiled launches of sample_guided, and what their machine code must keep."""

import torch

from emu3_kernels.ops.sampling.triton import forward
from emu3_kernels.runtime.contracts import Config, Contract, meta


def _sample(batch: int, length: int, *, top_k: int, top_p: float, num: int) -> None:
    cond, uncond = meta(2 * batch, length, 32768, dtype=torch.float32).chunk(2)
    seeds, places = meta(batch, dtype=torch.int64), meta(batch, length, dtype=torch.int64)
    forward(cond, uncond, seeds, places, 3.0, top_k, top_p, 1.0, num)


def _one_code() -> None:
    """One code of each of two images."""
    _sample(2, 1, top_k=2048, top_p=1.0, num=1)


def _window() -> None:
    """A window of 64 codes of one image, eight candidates for each."""
    _sample(1, 64, top_k=2048, top_p=1.0, num=8)


def _prefix() -> None:
    """One code of the smallest prefix."""
    _sample(2, 1, top_k=32768, top_p=0.9, num=1)


# One program of 1,024 threads a multiprocessor: an NVIDIA GPU has 64 registers for each, so that
# more would spill, gfx942 has 128. Narrow are a seed, a place and the codes.
SAMPLE = {
    "sample_guided_kernel": Contract(
        max_registers=128,
        scalar_loads=2,
        scalar_stores=2,
        few_programs="a program for each row of logits",
        exceptions={
            "gfx942: spills": "a few scalar registers, into vector registers: none to memory"
        },
    ),
}

CONFIGS = {
    "sample_guided": (
        Config("emu3_one_code", _one_code, SAMPLE),
        Config("emu3_window", _window, SAMPLE),
        Config("emu3_prefix", _prefix, SAMPLE),
    ),
}
