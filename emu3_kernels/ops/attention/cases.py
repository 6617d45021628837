"""Sizes of attention that the tests check and the benchmarks time."""

import torch
from torch import Tensor

CHECK = [
    {"batch": 2, "queries": 0, "keys": 0, "heads": 2, "groups": 1, "width": 64},
    {"batch": 1, "queries": 1, "keys": 4, "heads": 1, "groups": 1, "width": 64, "lse": True},
    {"batch": 2, "queries": 3, "keys": 9, "heads": 4, "groups": 2, "width": 64, "lse": True},
    {"batch": 1, "queries": 9, "keys": 6, "heads": 2, "groups": 2, "width": 64},  # 3 see nothing
    {"batch": 1, "queries": 70, "keys": 70, "heads": 3, "groups": 1, "width": 64, "causal": False},
    {"batch": 2, "queries": 67, "keys": 67, "heads": 2, "groups": 1, "width": 64, "dropout": 0.3},
    {"batch": 1, "queries": 131, "keys": 131, "heads": 2, "groups": 2, "width": 128, "lse": True},
    # Documents of 1, 40, 64 and 28 tokens: inside a block, across blocks, and a ragged rest.
    {"batch": 2, "queries": 133, "keys": 133, "heads": 4, "groups": 2, "width": 128,
     "documents": [1, 41, 105], "lse": True},
]  # fmt: skip
TIME = [
    {"batch": 1, "queries": 2048, "keys": 2048, "heads": 8, "groups": 2, "width": 128},
    {"batch": 1, "queries": 8192, "keys": 8192, "heads": 8, "groups": 2, "width": 128},
]


def make(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    groups: int,
    width: int,
    causal: bool = True,
    documents: list[int] | None = None,
    dropout: float = 0.0,
    lse: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | float | bool | None]:
    """Draw scores a few units wide, so that a softmax is neither flat nor a single key.

    Values are exact in every dtype: products are then nearly so, in whatever order they are
    summed, and dq of a row that one key dominates, a difference of two of them, is not chance.
    """
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    starts = torch.tensor(documents or [], dtype=torch.int64, device=device)
    ids = torch.searchsorted(starts, torch.arange(queries, device=device), right=True)
    return {
        "q": (2 * torch.randn(batch, queries, heads, width, **on)).bfloat16().to(dtype),
        "k": torch.randn(batch, keys, groups, width, **on).bfloat16().to(dtype),
        "v": torch.randn(batch, keys, groups, width, **on).bfloat16().to(dtype),
        "causal": causal,
        "document_ids": None if documents is None else ids.int().expand(batch, -1),
        "dropout_p": dropout,
        "seed": torch.tensor(1234, device=device) if dropout else None,
        "return_lse": lse,
    }


def flops(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
) -> int:
    """Two products over the keys that a causal mask leaves, forward."""
    seen = queries * keys - queries * (queries - 1) // 2
    return 4 * batch * heads * width * seen
