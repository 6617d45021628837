"""Sizes of rope_append that the tests check and the benchmarks time."""

import torch
from torch import Tensor

CONSTANTS = ("q", "k", "v", "cos", "sin", "key_cache", "value_cache")
WRITTEN = ("key_cache", "value_cache")
CHECK = [
    {"batch": 2, "tokens": 0, "slots": 3, "heads": 2, "groups": 1, "width": 8},
    {"batch": 1, "tokens": 1, "slots": 1, "heads": 1, "groups": 1, "width": 2},  # all tail
    {"batch": 2, "tokens": 5, "slots": 9, "heads": 4, "groups": 2, "width": 128},  # Emu3's head
    # Half a head is one vector of every level and a ragged rest; positions are not the slots.
    {"batch": 3, "tokens": 2, "slots": 7, "heads": 3, "groups": 3, "width": 70, "padded": True},
]
EMU3 = {"heads": 32, "groups": 8, "width": 128}
TIME = [
    {"batch": 1, "tokens": 1, "slots": 8192} | EMU3,  # Emu3-8B, one decoded token
    {"batch": 16, "tokens": 1, "slots": 1024} | EMU3,  # of sixteen sequences
    {"batch": 1, "tokens": 2048, "slots": 2048} | EMU3,  # one prompt
]


def make(
    *,
    batch: int,
    tokens: int,
    slots: int,
    heads: int,
    groups: int,
    width: int,
    padded: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    angles = 7 * torch.rand(slots, width // 2, **on)
    where = torch.stack([torch.randperm(slots, **on)[:tokens] for _ in range(batch)])
    positions = torch.randint(slots, (batch, tokens), **on) if padded else None
    qkv = torch.randn(batch, tokens, heads + 2 * groups, width, **on).to(dtype)
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    keys, values = torch.randn(2, batch, slots, groups, width, **on).to(dtype)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "key_cache": keys,
        "value_cache": values,
        "slots": where,
        "positions": positions,
    }


def bytes_moved(
    *,
    batch: int,
    tokens: int,
    slots: int,
    heads: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
) -> int:
    """Traffic that no implementation can avoid: q, k and v in and out, a row of each table."""
    num_heads = batch * tokens * (heads + 2 * groups)
    return 2 * num_heads * width * dtype.itemsize + 4 * batch * tokens * width
