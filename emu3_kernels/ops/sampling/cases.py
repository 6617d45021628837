"""Sizes of sample_guided that the tests check and the benchmarks time."""

from math import prod

import torch

from emu3_kernels.runtime.cases import Cases


def make(
    *,
    shape: tuple[int, ...],
    guidance: float = 3.0,
    top_k: int | None = 2048,
    top_p: float | None = None,
    temperature: float = 1.0,
    num: int = 1,
    dtype: torch.dtype,
    device: str,
) -> dict:
    """Normal logits in multiples of 1 / 8: guided ones are exact in any dtype, many are equal."""
    random = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(shape, generator=random, device=device) for _ in range(2))
    cond, uncond = ((x.clamp(-3, 3) * 16).round() / 8 for x in logits)
    places = torch.arange(prod(shape[:-1]), device=device).view(shape[:-1])
    return {
        "cond": cond.to(dtype),
        "uncond": None if guidance == 1 else uncond.to(dtype),
        "seeds": torch.arange(shape[0], device=device) + 0x299F31D0A4093822,
        "places": places,
        "guidance": guidance,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
        "num": num,
    }


def bytes_moved(
    *, shape: tuple[int, ...], guidance: float = 3.0, num: int = 1, dtype: torch.dtype, **_: object
) -> int:
    """Traffic that no implementation can avoid: the logits once, a seed, places and codes."""
    logits = (1 if guidance == 1 else 2) * prod(shape) * dtype.itemsize
    return logits + 8 * (shape[0] + prod(shape[:-1]) * (1 + num))


CASES = {
    "sample_guided": Cases(
        make=make,
        check=[
            {"shape": (0, 3, 8)},
            {"shape": (2, 1)},  # one code
            {"shape": (3, 7), "guidance": 1.0, "top_k": None, "num": 8},  # more than there are
            {"shape": (2, 3, 512), "top_k": 1, "num": 2},  # greedy: the second is -1
            {"shape": (2, 2, 515), "top_k": 100, "top_p": 0.5, "temperature": 2.0, "num": 3},
            {"shape": (1, 2, 4133), "top_k": None, "top_p": 0.9, "temperature": 0.5, "num": 2},
            {"shape": (2, 2, 8195), "guidance": 0.5, "num": 2},  # three blocks of Triton
        ],
        time=[
            {"shape": (2, 1, 32768)},  # Emu3: one code of two images
            {"shape": (1, 64, 32768)},  # Emu3: a window of 64 codes of one image
        ],
        bytes_moved=bytes_moved,
        constants=("cond", "uncond"),
    ),
}
