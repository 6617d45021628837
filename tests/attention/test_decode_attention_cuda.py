"""The real CUDA kernels of decode_attention, run on the CPU under fiber.h."""

import math
import struct

import pytest
import torch

from emu3_kernels.ops.attention.cuda import HEAD_DIMS
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference
from tests.gates.fibers import fiber
from tests.gates.fibers.fiber import raw

FEW, MANY = 10_000, 1
"""SMs of a GPU that needs as many splits as there are, and of one that needs few."""


def on_fibers(
    q, k_cache, v_cache, lengths, scale, page_table, mask=None, multiprocessors=FEW, seed=0
):
    """decode_attention by the CUDA kernels, called as their binding calls them."""
    (batch, new, heads, head_dim), kv_heads = q.shape, k_cache.shape[2]
    columns = 0 if page_table is None else page_table.shape[1]
    page = k_cache.shape[1]
    data = [raw(tensor) for tensor in (q, k_cache, v_cache)]
    header = struct.pack(
        "d24q", scale * math.log2(math.e), q.dtype == torch.bfloat16, batch, new, heads // kv_heads,
        kv_heads, head_dim, page * max(columns, 1), page, columns, mask is not None,
        multiprocessors, seed,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *map(len, data),
    )  # fmt: skip
    rest = [lengths, page_table, mask]
    rest = b"".join(raw(tensor) for tensor in rest if tensor is not None)
    program = fiber.build("run_decode_attention.cpp")
    out = fiber.run(program, stdin=header + b"".join(data) + rest)
    return torch.frombuffer(bytearray(out), dtype=q.dtype).view(q.shape)


def check(inputs, **settings):
    low = reference("decode_attention")(**inputs)
    exact = reference("decode_attention")(**double(inputs))
    assert_as_accurate("out", on_fibers(**inputs, **settings), low, exact)


SIZES = [s for s in cases("decode_attention").check if s["batch"] and s["width"] in HEAD_DIMS]


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype, multiprocessors):
    check(
        cases("decode_attention").make(**size, dtype=dtype, device="cpu"),
        multiprocessors=multiprocessors,
    )


@pytest.mark.parametrize("heads", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 129])
def test_splits_of_whole_blocks_and_one_key(capacity, heads):
    """9 heads of a KV head are a block of 8 queries and a ragged one."""
    size = {"batch": 1, "new": 1, "capacity": capacity, "heads": heads, "groups": 1, "width": 64}
    check(cases("decode_attention").make(**size, dtype=torch.float32, device="cpu"))


def test_the_order_of_threads_changes_nothing():
    inputs = cases("decode_attention").make(
        **cases("decode_attention").check[-1], dtype=torch.bfloat16, device="cpu"
    )
    first, *others = (on_fibers(**inputs, seed=seed) for seed in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_strided_caches_are_read_in_place():
    size = {"batch": 2, "new": 1, "capacity": 70, "heads": 4, "groups": 2, "width": 64}
    inputs = cases("decode_attention").make(**size, dtype=torch.float32, device="cpu")
    expected = on_fibers(**inputs)
    caches = torch.stack([torch.stack([inputs["k_cache"], inputs["v_cache"]])] * 2, dim=2)
    inputs |= {"k_cache": caches[0, :, 1], "v_cache": caches[1, :, 1]}
    assert torch.equal(on_fibers(**inputs), expected)
    apart = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
             for name in ("k_cache", "v_cache")}  # fmt: skip
    assert torch.equal(on_fibers(**inputs | apart), expected)
