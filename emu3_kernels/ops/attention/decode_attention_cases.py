"""Sizes of decode_attention that the tests check and the benchmarks time."""

import torch
from torch import Tensor

from emu3_kernels.runtime.library import in_large_pages

CONSTANTS = ("q", "k_cache", "v_cache")
CHECK = [
    {"batch": 0, "new": 1, "capacity": 8, "heads": 2, "groups": 1, "width": 64},
    {"batch": 1, "new": 1, "capacity": 1, "heads": 1, "groups": 1, "width": 64},
    # A row that is full, one that ends a key after a block, one that holds nothing.
    {"batch": 3, "new": 1, "capacity": 300, "heads": 8, "groups": 2, "width": 128,
     "lengths": [300, 257, 0]},
    # The first query of the second row sees nothing.
    {"batch": 2, "new": 3, "capacity": 70, "heads": 8, "groups": 1, "width": 64,
     "lengths": [70, 2]},
    {"batch": 2, "new": 16, "capacity": 130, "heads": 4, "groups": 4, "width": 64,
     "lengths": [16, 129]},
    {"batch": 2, "new": 16, "capacity": 96, "heads": 8, "groups": 1, "width": 64, "page": 32},
    {"batch": 2, "new": 2, "capacity": 112, "heads": 4, "groups": 1, "width": 128,
     "lengths": [112, 33], "page": 16},
]  # fmt: skip
TIME = [
    # Emu3-8B, one token: at the end of its context; after an image of 720 x 720, guided.
    {"batch": 1, "new": 1, "capacity": 131_072, "heads": 32, "groups": 8, "width": 128},
    {"batch": 2, "new": 1, "capacity": 8192, "heads": 32, "groups": 8, "width": 128},
]


def make(
    *,
    batch: int,
    new: int,
    capacity: int,
    heads: int,
    groups: int,
    width: int,
    lengths: list[int] | None = None,
    page: int | None = None,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | float | None]:
    """Draw scores a few units wide; what no row has is NaN, or a page that is none.

    Keys and values lie in large pages, as those of a cache of ours do.
    """
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    ends = torch.tensor(lengths or [capacity] * batch, dtype=torch.int32, device=device)
    absent = (torch.arange(capacity, device=device) >= ends[:, None])[..., None, None]
    shape = batch, capacity, groups, width
    k, v = (
        in_large_pages(torch.empty(shape, dtype=dtype, device=device))
        .normal_(generator=random)
        .masked_fill_(absent, torch.nan)
        for _ in range(2)
    )
    table = None
    if page:
        k, v, table = paged(k, v, page, random)
        table = table.where(torch.arange(0, capacity, page, device=device) < ends[:, None], -7)
    return {
        "q": (2 * torch.randn(batch, new, heads, width, **on)).to(dtype),
        "k_cache": k,
        "v_cache": v,
        "lengths": ends,
        "scale": 1.25 * width**-0.5,
        "page_table": table,
    }


def paged(
    k: Tensor, v: Tensor, page: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut ``[B, S, G, K]`` into pages in random order, and tell where they went."""
    batch, capacity = k.shape[:2]
    places = torch.randperm(batch * capacity // page, generator=random, device=k.device)
    k, v = (cache.reshape(-1, page, *cache.shape[2:])[places.argsort()] for cache in (k, v))
    return k, v, places.view(batch, -1).int()


def bytes_moved(
    *,
    batch: int,
    new: int,
    capacity: int,
    heads: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
) -> int:
    """Traffic that no implementation can avoid: keys and values once, q in, out out."""
    return 2 * batch * (capacity * groups + new * heads) * width * dtype.itemsize
