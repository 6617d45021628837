"""Sizes of attention and decode_attention that the tests check and the benchmarks time.

In a size ``groups`` is the number of KV heads and ``width`` is head_dim: published results are
stored under these keys.
"""

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases
from emu3_kernels.runtime.library import advise_huge_pages

ATTENTION_CHECK = [
    {"batch": 2, "queries": 0, "keys": 0, "heads": 2, "groups": 1, "width": 64},
    {"batch": 1, "queries": 1, "keys": 4, "heads": 1, "groups": 1, "width": 64, "lse": True},
    {"batch": 2, "queries": 3, "keys": 9, "heads": 4, "groups": 2, "width": 64, "lse": True},
    {"batch": 1, "queries": 9, "keys": 6, "heads": 2, "groups": 2, "width": 64},  # 3 have no key
    {"batch": 1, "queries": 70, "keys": 70, "heads": 3, "groups": 1, "width": 64, "causal": False},
    {"batch": 2, "queries": 67, "keys": 67, "heads": 2, "groups": 1, "width": 64, "dropout": 0.3},
    {"batch": 1, "queries": 131, "keys": 131, "heads": 2, "groups": 2, "width": 128, "lse": True},
    # Documents of 1, 40, 64 and 28 tokens: inside a block, across blocks, and a ragged rest.
    {"batch": 2, "queries": 133, "keys": 133, "heads": 4, "groups": 2, "width": 128,
     "documents": [1, 41, 105], "lse": True},
]  # fmt: skip
ATTENTION_TIME = [
    {"batch": 1, "queries": 2048, "keys": 2048, "heads": 8, "groups": 2, "width": 128},
    {"batch": 1, "queries": 8192, "keys": 8192, "heads": 8, "groups": 2, "width": 128},
]
DECODE_CHECK = [
    {"batch": 0, "new": 1, "capacity": 8, "heads": 2, "groups": 1, "width": 64},
    {"batch": 1, "new": 1, "capacity": 1, "heads": 1, "groups": 1, "width": 64},
    # A row that is full, one that ends a key after a block, one that is empty.
    {"batch": 3, "new": 1, "capacity": 300, "heads": 8, "groups": 2, "width": 128,
     "lengths": [300, 257, 0]},
    # The first query of the second row has no key.
    {"batch": 2, "new": 3, "capacity": 70, "heads": 8, "groups": 1, "width": 64,
     "lengths": [70, 2]},
    {"batch": 2, "new": 16, "capacity": 130, "heads": 4, "groups": 4, "width": 64,
     "lengths": [16, 129]},
    {"batch": 2, "new": 16, "capacity": 96, "heads": 8, "groups": 1, "width": 64, "page": 32},
    {"batch": 2, "new": 2, "capacity": 112, "heads": 4, "groups": 1, "width": 128,
     "lengths": [112, 33], "page": 16},
    # Channels that are no power of two.
    {"batch": 2, "new": 3, "capacity": 70, "heads": 4, "groups": 2, "width": 40},
    # Trees: of all 64 bits, over two tiles of queries; across blocks of keys; a row without
    # other keys, and one whose first tokens have none at all.
    {"batch": 1, "new": 64, "capacity": 97, "heads": 6, "groups": 2, "width": 64, "tree": True},
    {"batch": 3, "new": 20, "capacity": 96, "heads": 2, "groups": 1, "width": 128,
     "lengths": [75, 20, 7], "page": 16, "tree": True},
]  # fmt: skip
DECODE_TIME = [
    # Emu3-8B, one token: at the end of its context; after an image of 720 x 720, guided.
    {"batch": 1, "new": 1, "capacity": 131_072, "heads": 32, "groups": 8, "width": 128},
    {"batch": 2, "new": 1, "capacity": 8192, "heads": 32, "groups": 8, "width": 128},
    # Drafts of parallel decoding in the middle of that image.
    {"batch": 2, "new": 16, "capacity": 4096, "heads": 32, "groups": 8, "width": 128, "tree": True},
    {"batch": 2, "new": 64, "capacity": 4096, "heads": 32, "groups": 8, "width": 128, "tree": True},
]


def make_attention(
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
    """Draw scores of a few units, so that a softmax is neither flat nor a single key.

    Values are exact in every dtype. Dot products are then nearly exact in any order of summation,
    so dq of a row that one key dominates, a difference of two of them, is no rounding noise.
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


def attention_flops(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
) -> int:
    """Two matmuls over the keys that a causal mask leaves, forward."""
    visible = queries * keys - queries * (queries - 1) // 2
    return 4 * batch * heads * width * visible


def make_decode(
    *,
    batch: int,
    new: int,
    capacity: int,
    heads: int,
    groups: int,
    width: int,
    lengths: list[int] | None = None,
    page: int | None = None,
    tree: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | float | None]:
    """Draw scores of a few units; keys beyond a row are NaN, and their pages do not exist.

    Keys and values are stored in huge pages, as those of ``emu3.cache`` are.
    """
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    ends = torch.tensor(lengths or [capacity] * batch, dtype=torch.int32, device=device)
    absent = (torch.arange(capacity, device=device) >= ends[:, None])[..., None, None]
    shape = batch, capacity, groups, width
    k, v = (
        advise_huge_pages(torch.empty(shape, dtype=dtype, device=device))
        .normal_(generator=random)
        .masked_fill_(absent, torch.nan)
        for _ in range(2)
    )
    table = None
    if page:
        k, v, table = paged(k, v, page, random)
        table = table.where(torch.arange(0, capacity, page, device=device) < ends[:, None], -7)
    mask = {"mask": random_trees(batch, new, random)} if tree else {}
    return mask | {
        "q": (2 * torch.randn(batch, new, heads, width, **on)).to(dtype),
        "k_cache": k,
        "v_cache": v,
        "lengths": ends,
        "scale": 1.25 * width**-0.5,
        "page_table": table,
    }


def random_trees(batch: int, new: int, random: torch.Generator) -> Tensor:
    """Draw a parent for every token but the first; return the words of itself and its ancestors."""
    on = {"device": random.device}
    words = torch.ones(batch, new, dtype=torch.int64, **on) << torch.arange(new, **on)
    for i in range(1, new):
        parent = torch.randint(i, (batch, 1), generator=random, **on)
        words[:, i] |= words.gather(1, parent)[:, 0]
    return words


def paged(
    k: Tensor, v: Tensor, page: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut ``[B, S, KV, K]`` into pages in random order; return them and the page table."""
    batch, capacity = k.shape[:2]
    pages = torch.randperm(batch * capacity // page, generator=random, device=k.device)
    k, v = (cache.reshape(-1, page, *cache.shape[2:])[pages.argsort()] for cache in (k, v))
    return k, v, pages.view(batch, -1).int()


def decode_bytes(
    *,
    batch: int,
    new: int,
    capacity: int,
    heads: int,
    groups: int,
    width: int,
    tree: bool = False,
    dtype: torch.dtype,
) -> int:
    """Traffic that no implementation can avoid: keys and values once, q in, out out."""
    return 2 * batch * (capacity * groups + new * heads) * width * dtype.itemsize


CASES = {
    "attention": Cases(
        make=make_attention, check=ATTENTION_CHECK, time=ATTENTION_TIME, flops=attention_flops
    ),
    "decode_attention": Cases(
        make=make_decode,
        check=DECODE_CHECK,
        time=DECODE_TIME,
        bytes_moved=decode_bytes,
        constants=("q", "k_cache", "v_cache"),
    ),
}
