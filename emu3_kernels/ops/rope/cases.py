"""Sizes of rope and rope_append that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases

EMU3 = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def make_rope(
    *,
    batch: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    shuffled: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    num_positions = max(tokens, 8)
    angles = 7 * torch.rand(num_positions, head_dim // 2, **on)
    positions = torch.randint(num_positions, (batch, tokens), **on) if shuffled else None
    return {
        "q": torch.randn(batch, tokens, num_heads, head_dim, **on).to(dtype),
        "k": torch.randn(batch, tokens, num_kv_heads, head_dim, **on).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": positions,
    }


def rope_bytes(
    *, batch: int, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """q and k are read and written, the tables are read once; so are dq and dk backward."""
    heads = batch * tokens * (num_heads + num_kv_heads)
    return 2 * heads * head_dim * dtype.itemsize + 4 * tokens * head_dim


def make_rope_append(
    *,
    batch: int,
    tokens: int,
    slots: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    padded: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    angles = 7 * torch.rand(slots, head_dim // 2, **on)
    where = torch.stack([torch.randperm(slots, **on)[:tokens] for _ in range(batch)])
    positions = torch.randint(slots, (batch, tokens), **on) if padded else None
    qkv = torch.randn(batch, tokens, num_heads + 2 * num_kv_heads, head_dim, **on).to(dtype)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    keys, values = torch.randn(2, batch, slots, num_kv_heads, head_dim, **on).to(dtype)
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


def append_bytes(
    *,
    batch: int,
    tokens: int,
    slots: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """q, k and v are read and written, a row of each table is read."""
    heads = batch * tokens * (num_heads + 2 * num_kv_heads)
    return 2 * heads * head_dim * dtype.itemsize + 4 * batch * tokens * head_dim


CASES = {
    "rope": Cases(
        make=make_rope,
        constants=("cos", "sin"),
        check=[
            {"batch": 2, "tokens": 0, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            # All tail.
            {"batch": 1, "tokens": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2},
            # Emu3's head_dim.
            {"batch": 1, "tokens": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128},
            # Half a head is one vector of every level and a ragged rest; positions out of order.
            {"batch": 2, "tokens": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 70}
            | {"shuffled": True},
        ],
        time=[{"batch": 1, "tokens": 2048} | EMU3],  # Emu3-8B, one sequence
        decode=[{"batch": 1, "tokens": 1} | EMU3],  # Emu3-8B, one decoded token
        bytes_moved=rope_bytes,
        backward_bytes=rope_bytes,
    ),
    "rope_append": Cases(
        make=make_rope_append,
        constants=("q", "k", "v", "cos", "sin", "key_cache", "value_cache"),
        written=("key_cache", "value_cache"),
        check=[
            {"batch": 2, "tokens": 0, "slots": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            # All tail.
            {"batch": 1, "tokens": 1, "slots": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2},
            # Emu3's head_dim.
            {
                "batch": 2,
                "tokens": 5,
                "slots": 9,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 128,
            },
            # Half a head is one vector of every level and a ragged rest; positions are not slots.
            {"batch": 3, "tokens": 2, "slots": 7, "num_heads": 3, "num_kv_heads": 3, "head_dim": 70}
            | {"padded": True},
        ],
        time=[
            {"batch": 1, "tokens": 1, "slots": 8192} | EMU3,  # Emu3-8B, one decoded token
            {"batch": 16, "tokens": 1, "slots": 1024} | EMU3,  # of sixteen sequences
            {"batch": 1, "tokens": 2048, "slots": 2048} | EMU3,  # one prompt
        ],
        bytes_moved=append_bytes,
    ),
}
