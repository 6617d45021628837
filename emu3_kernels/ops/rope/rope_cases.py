"""Sizes of rope that the tests check and the benchmarks time."""

import torch
from torch import Tensor

CONSTANTS = ("cos", "sin")
CHECK = [
    {"batch": 2, "tokens": 0, "heads": 2, "groups": 1, "width": 8},
    {"batch": 1, "tokens": 1, "heads": 1, "groups": 1, "width": 2},  # all tail
    {"batch": 1, "tokens": 5, "heads": 4, "groups": 2, "width": 128},  # Emu3's head
    # Half a head is one vector of every level and a ragged rest; positions out of order.
    {"batch": 2, "tokens": 3, "heads": 2, "groups": 1, "width": 70, "shuffled": True},
]
TIME = [
    {"batch": 1, "tokens": 2048, "heads": 32, "groups": 8, "width": 128},  # Emu3-8B, one sequence
]
DECODE = [
    {"batch": 1, "tokens": 1, "heads": 32, "groups": 8, "width": 128},  # Emu3-8B, one decoded token
]


def make(
    *,
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    width: int,
    shuffled: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    longest = max(tokens, 8)
    angles = 7 * torch.rand(longest, width // 2, **on)
    positions = torch.randint(longest, (batch, tokens), **on) if shuffled else None
    return {
        "q": torch.randn(batch, tokens, heads, width, **on).to(dtype),
        "k": torch.randn(batch, tokens, groups, width, **on).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": positions,
    }


def bytes_moved(
    *, batch: int, tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype
) -> int:
    """Forward traffic that no implementation can avoid: q and k in and out, the tables once."""
    return 2 * batch * tokens * (heads + groups) * width * dtype.itemsize + 4 * tokens * width


def backward_bytes(
    *, batch: int, tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype
) -> int:
    """Of a backward pass: the same rotation of dq and dk, turned back."""
    return 2 * batch * tokens * (heads + groups) * width * dtype.itemsize + 4 * tokens * width
