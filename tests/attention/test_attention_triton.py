"""What is special about attention in Triton: shards of a ring, head widths, scales, skipped blocks.

Float32 is interpreted; bfloat16, which the interpreter gets wrong, runs under ttsem.
"""

import os
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_kernels import Documents, attention
from emu3_kernels.ops.attention import reference
from emu3_kernels.ops.attention.key_ranges import (
    Dropout,
    KeyRanges,
    document_ranges,
    key_ranges_of,
    one_document,
)
from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

from emu3_kernels.ops.attention import triton, triton_backward

CASES = cases("attention")
TOKENS, HEADS, GROUPS, WIDTH = 4 * 19, 2, 1, 32  # a shard is a block of 32 and a ragged one
SCALE = WIDTH**-0.5
SEED = 1234


def zigzag(rank: int) -> torch.Tensor:
    """Positions of a shard of two: of four chunks, the first and the last, or the middle ones."""
    first, last = torch.arange(TOKENS).chunk(4)[rank :: 3 - 2 * rank][:2]
    return torch.cat([first, last])


def whole(q, k, v, mine, douts, **settings):
    """Return out and lse of the queries ``mine`` by the definition, and the gradients of all."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    seed = torch.tensor(SEED, device=q.device)
    out, lse = reference.attention(*leaves, seed=seed, return_lse=True, **settings)
    out, lse = out[:, mine], lse[:, :, mine]
    douts = [dout.to(result) for dout, result in zip(douts, (out, lse), strict=True)]
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, douts)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq[:, mine], "dk": dk, "dv": dv}


def merged(parts):
    """Merge the partial results of two shards of keys."""
    outs, lses = zip(*parts, strict=True)
    lse = torch.logaddexp(*lses)
    shares = [(part - lse).exp().nan_to_num(0).transpose(1, 2)[..., None] for part in lses]
    return sum(out * share for out, share in zip(outs, shares, strict=True)), lse


def sharded(q, k, v, mine, douts, device, causal, document_ids, dropout_p):
    """Do the same by the kernels, with the keys in two zigzag shards of a ring."""
    dout, dlse = (x.to(device) for x in douts)
    shards = [zigzag(rank).to(device) for rank in range(2)]
    calls = []
    for shard in shards:
        ids = [None if document_ids is None else document_ids[:, p] for p in (mine, shard)]
        key_ranges = key_ranges_of(mine, shard, *ids, causal=causal)
        positions = mine.int(), shard.int()
        dropout = Dropout(dropout_p, torch.tensor(SEED, device=device), *positions)
        settings = (key_ranges, SCALE, dropout if dropout_p else None)
        calls.append(((q[:, mine], k[:, shard], v[:, shard]), settings))
    out, lse = merged([triton.forward(*qkv, *rest, float32_out=True) for qkv, rest in calls])
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    gradients = [
        triton.backward(dout.to(q.dtype), *qkv, lse, delta, *rest, float32_out=True)
        for qkv, rest in calls
    ]
    dk, dv = torch.full_like(k, torch.nan).float(), torch.full_like(v, torch.nan).float()
    for shard, (_, dk_part, dv_part) in zip(shards, gradients, strict=True):
        dk[:, shard], dv[:, shard] = dk_part, dv_part
    return {"out": out, "lse": lse, "dq": sum(g[0] for g in gradients), "dk": dk, "dv": dv}


DOCUMENTS = ((), (1, 16, 40, 60))
"""Where documents begin: none, and inside the chunks of the shards, whose borders they straddle."""


def check_ring(rank, causal, documents, dropout_p, device, dtype=torch.float32, emulate=False):
    random = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, TOKENS, n, WIDTH, generator=random).bfloat16().to(device, dtype)
        for n in (HEADS, GROUPS, GROUPS, HEADS)
    )
    mine = zigzag(rank).to(device)
    douts = dout[:, mine].float(), torch.randn(2, HEADS, len(mine), generator=random).to(device)
    starts = torch.tensor(documents, dtype=torch.int64)
    ids = torch.searchsorted(starts, torch.arange(TOKENS), right=True).int().expand(2, -1)
    settings = {
        "causal": causal,
        "document_ids": ids.to(device) if documents else None,
        "dropout_p": dropout_p,
    }
    context = nullcontext()
    if emulate:
        from tests.gates.emulated import emulated

        context = emulated()
    with context:
        actual = sharded(q, k, v, mine, douts, device, **settings)
    low = whole(q, k, v, mine, douts, scale=SCALE, **settings)
    exact = whole(*(x.double() for x in (q, k, v)), mine, douts, scale=SCALE, **settings)
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        assert_as_accurate(name, value.to(low[name].dtype), low[name], exact[name])


RING = [
    pytest.param(0, True, DOCUMENTS[0], 0.0, id="first and last chunk"),
    pytest.param(1, True, DOCUMENTS[1], 0.3, id="middle chunks, documents, dropout"),
    pytest.param(1, False, DOCUMENTS[1], 0.0, id="middle chunks, documents, not causal"),
]


@pytest.mark.parametrize(("rank", "causal", "documents", "dropout_p"), RING)
def test_shards_of_a_ring_add_up(rank, causal, documents, dropout_p, device):
    """Some queries have no key in a shard, and lse and delta are the whole's."""
    check_ring(rank, causal, documents, dropout_p, device)


@pytest.mark.skipif(not find_spec("ttsem"), reason="ttsem is not installed")
def test_shards_of_a_ring_add_up_in_bfloat16(emulating):
    emulating(check_ring, 1, True, DOCUMENTS[1], 0.3, "cpu", torch.bfloat16, True)


def check_public(device, settings=None, **size):
    size = {"batch": 1, "queries": 37, "keys": 41, "heads": 2, "groups": 1, "width": 16} | size
    inputs = CASES.make(**size, lse=True, dtype=torch.float32, device=device) | (settings or {})
    actual = value_and_gradients("attention", partial(attention, backend="triton"), inputs)
    low = value_and_gradients("attention", reference.attention, inputs)
    exact = value_and_gradients("attention", reference.attention, double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("width", [1, 8, 24, 80])
def test_heads_narrower_than_their_block(width, device):
    check_public(device, width=width)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.5])
def test_any_scale(scale, device):
    """The maximum is taken before scores are scaled, and a scale below 0 would turn it around."""
    check_public(device, {"scale": scale})


def test_wider_heads_are_refused(device):
    q = torch.randn(1, 4, 1, 160, device=device)
    with pytest.raises(NotImplementedError, match="head_dim of 128 at most, got 160"):
        attention(q, q, q, backend="triton")


def test_views_of_one_projection_need_no_copy(device):
    q, k, v = torch.randn(1, 70, 4, 64, device=device).split((2, 1, 1), dim=2)
    packed = triton.forward(q, k, v, *causal(q, k))
    alone = triton.forward(*(x.contiguous() for x in (q, k, v)), *causal(q, k))
    assert all(torch.equal(a, b) for a, b in zip(packed, alone, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a sparse file is no memory of a GPU")
def test_offsets_need_64_bits(tmp_path):
    """The third token lies beyond 2**31 elements, in a file that has no pages between them."""
    stride = 2**30 + 64
    file = torch.from_file(
        str(tmp_path / "heads"), shared=True, size=2 * stride + 64, dtype=torch.float16
    )
    far = file.as_strided((1, 3, 1, 64), (0, stride, 64, 1)).copy_(torch.randn(1, 3, 1, 64))
    near, dout = far.clone(), torch.randn(1, 3, 1, 64).half()
    results = []
    for x in (far, near):
        out, lse = triton.forward(x, x, x, *causal(x, x))
        results.append((out, lse, *triton.backward(dout, x, x, x, lse, lse, *causal(x, x))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def causal(q, k):
    positions = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    return key_ranges_of(*positions, causal=True), SCALE, None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (37, 101), (101, 37), (33, 1)])
def test_key_ranges_are_the_same_as_tensors_and_as_an_offset(queries, keys, causal, device):
    q, dout = torch.randn(2, 2, queries, 2, 16, device=device)
    k, v = torch.randn(2, 2, keys, 1, 16, device=device)
    offset = one_document(queries, keys, causal=causal)
    results = []
    for key_ranges in (offset, KeyRanges(*offset.tensors(q, k))):
        out, lse = triton.forward(q, k, v, key_ranges, SCALE, None)
        delta = (out * dout).sum(-1).transpose(1, 2)
        gradients = triton.backward(dout, q, k, v, lse, delta, key_ranges, SCALE, None)
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_blocks_of_other_documents_are_not_read(device):
    """They would be masked: without NaN in them only the time would tell."""
    inputs = CASES.make(
        batch=1, queries=384, keys=384, heads=1, groups=1, width=16, documents=[128, 256],
        dtype=torch.float32, device=device,
    )  # fmt: skip
    q, k, v, ids = (inputs[name] for name in ("q", "k", "v", "document_ids"))
    for x in (q, k, v):
        x[:, :128], x[:, 256:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, document_ids=ids, backend="triton")
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for x in (out, *gradients):
        assert x[:, 128:256].isfinite().all()


@pytest.mark.parametrize("keys", [0, 3])
def test_queries_without_keys_give_zero(keys, device):
    q, k = torch.randn(1, 3, 2, 16, device=device), torch.randn(1, keys, 2, 16, device=device)
    key_ranges, *rest = causal(q, k)
    nothing = KeyRanges(*(torch.zeros_like(x) for x in key_ranges[:2]))
    out, lse = triton.forward(q, k, k, nothing, *rest)
    gradients = triton.backward(q, q, k, k, lse, lse.new_zeros(lse.shape), nothing, *rest)
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in (out, *gradients))


class Launched(TorchDispatchMode):
    """Records the ops of PyTorch that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "empty" not in name and name != "detach" and not function.is_view:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_launches_its_three_kernels_alone(packed, dropout_p, device, monkeypatch):
    """Forward, dq with delta, dk with dv: key ranges are searched and ids checked once a model."""
    kernels = []
    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: kernels.append(kernel))
    leaves = [torch.randn(1, 70, n, 16, device=device, requires_grad=True) for n in (2, 1, 1)]
    ids = torch.arange(70, dtype=torch.int32, device=device)[None] // 30
    settings = {"document_ids": Documents(ids) if packed else None, "dropout_p": dropout_p}
    settings["seed"] = torch.tensor(1, device=device) if dropout_p else None
    with Launched() as pytorch:
        out, lse = attention(*leaves, **settings, return_lse=True, backend="triton")
        torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()))
    assert [kernel.__name__ for kernel in kernels] == [
        "attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"
    ]  # fmt: skip
    assert pytorch.names == []


@pytest.mark.parametrize("backend", ["triton", "reference", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_made_once_are_the_ids_of_every_call(causal, backend, device):
    if backend == "cpu" and library.MISSING:
        pytest.skip(library.MISSING)
    device = "cpu" if backend == "cpu" else device
    size = {"batch": 2, "queries": 75, "keys": 75, "heads": 2, "groups": 1, "width": 16}
    inputs = CASES.make(
        **size, documents=[1, 30, 64], causal=causal, dtype=torch.float32, device=device
    )
    documents = {"document_ids": Documents(inputs["document_ids"], causal=causal)}
    call = partial(attention, backend=backend)
    expected = value_and_gradients("attention", call, inputs)
    for name, value in value_and_gradients("attention", call, inputs | documents).items():
        assert torch.equal(value, expected[name]), name


def test_documents_refuse_calls_they_were_not_made_for(device):
    q = torch.randn(1, 6, 1, 8, device=device)
    ids = torch.zeros(1, 6, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="must be made for causal=True, got False"):
        attention(q, q, q, document_ids=Documents(ids, causal=False))
    with pytest.raises(ValueError, match=r"document_ids must be \(1, 5\)"):
        attention(q[:, :5], q[:, :5], q[:, :5], document_ids=Documents(ids))
    with pytest.raises(TypeError, match=r"must be \[B, T\] int32, got"):
        Documents(ids.long())
    if device == "cpu":
        with pytest.raises(ValueError, match="must not decrease along T"):
            Documents(torch.tensor([[1, 0]], dtype=torch.int32))


@pytest.mark.parametrize(("queries", "keys", "causal"), [(5, 5, True), (3, 9, True), (9, 3, False)])
def test_query_ranges_are_the_key_ranges_from_the_side_of_the_keys(queries, keys, causal):
    q, k = torch.empty(1, queries, 1, 2), torch.empty(1, keys, 1, 2)
    key_ranges = one_document(queries, keys, causal=causal)
    first, end = key_ranges.tensors(q, k)
    by_query = (first[0, :, None] <= torch.arange(keys)) & (torch.arange(keys) < end[0, :, None])
    first, end, _ = KeyRanges(first, end).query_ranges(keys)
    i = torch.arange(queries)[:, None]
    assert torch.equal((first[0] <= i) & (i < end[0]), by_query)


@pytest.mark.parametrize("causal", [True, False])
def test_the_query_ranges_of_documents_need_no_search(causal):
    ids = torch.tensor([[0, 0, 0, 1, 1, 4], [2, 3, 3, 3, 3, 3]], dtype=torch.int32)
    ranges = document_ranges(ids, causal=causal, with_queries=True)
    searched = ranges._replace(queries=None).query_ranges(6)
    for actual, expected in zip(ranges.queries[:2], searched[:2], strict=True):
        assert torch.equal(actual, expected)
    positions = torch.arange(6, dtype=torch.int32)
    expected = key_ranges_of(positions, positions, ids, ids, causal=causal)
    assert torch.equal(torch.stack(ranges[:2]), torch.stack(expected[:2]))
