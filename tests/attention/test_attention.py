"""What is special about attention on the CPU: blocks, key ranges, threads, layouts, head_dim."""

import ctypes
import mmap
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_kernels import attention
from emu3_kernels.ops.attention import cpu, reference
from emu3_kernels.ops.attention.key_ranges import (
    Dropout,
    KeyRanges,
    key_ranges_of,
    one_document,
)
from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients
from tests.attention import plain_attention

needs_library = pytest.mark.skipif(bool(library.MISSING), reason=str(library.MISSING))
pytestmark = needs_library

CASES = cases("attention")
# A block of keys is 192, one of queries 192 rows: 96 queries where two heads share their keys.
SEVERAL_BLOCKS = {"batch": 2, "queries": 290, "keys": 410, "heads": 4, "groups": 2, "width": 24}
PLAIN = {"causal": True, "document_ids": None, "scale": 0.5, "dropout_p": 0.0, "seed": None}
FLOATS = torch.float32, torch.bfloat16


def check(inputs, **backend):
    """Hold values and gradients to the reference."""
    oracle = partial(value_and_gradients, "attention", reference.attention)
    low, exact = oracle(inputs), oracle(double(inputs))
    actual = value_and_gradients("attention", partial(attention, **backend), inputs)
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.fixture(params=library.cpu_levels())
def level(request):
    with library.use_cpu_level(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [6, 8, 40, 256])
def test_every_even_width_of_a_head(level, width, dtype):
    inputs = CASES.make(**SEVERAL_BLOCKS | {"width": width}, lse=True, dtype=dtype, device="cpu")
    # Of a flat softmax: no error is the lse's own rounding times the one key of a row.
    check(inputs | {"scale": 0.3 / width**0.5}, backend="cpu")


@pytest.mark.parametrize("width", [7, 258])
def test_other_widths_are_refused_with_a_reason(width):
    inputs = CASES.make(**SEVERAL_BLOCKS | {"width": width}, dtype=torch.float32, device="cpu")
    with pytest.raises(NotImplementedError, match=f"left to the reference, got {width}"):
        attention(**inputs, backend="cpu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_heads_than_a_block_has_rows_share_their_keys(dtype):
    size = {"batch": 1, "queries": 5, "keys": 9, "heads": 200, "groups": 1, "width": 8}
    check(CASES.make(**size, dtype=dtype, device="cpu"), backend="cpu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_single_key_is_its_value(level, dtype):
    """dq is a difference of equal numbers, and its tolerance 0: the rest is held to its own."""
    size = {"batch": 2, "queries": 1, "keys": 1, "heads": 2, "groups": 2, "width": 24}
    inputs = CASES.make(**size, dtype=dtype, device="cpu")
    v, dout = inputs["v"].requires_grad_(), torch.randn(2, 1, 2, 24).to(dtype)
    out = attention(**inputs, scale=0.3 / 24**0.5, backend="cpu")
    (dv,) = torch.autograd.grad(out, v, dout)
    assert_as_accurate("out", out, v, v.double())
    assert_as_accurate("dv", dv, dout, dout.double())


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_no_query_or_no_key(queries, keys):
    size = SEVERAL_BLOCKS | {"queries": queries, "keys": keys}
    check(CASES.make(**size, dtype=torch.bfloat16, device="cpu"), backend="cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_threads_and_repetition_change_no_bit(dtype, dropout):
    size = {"batch": 1, "queries": 700, "keys": 700, "heads": 4, "groups": 2, "width": 16}
    inputs = CASES.make(**size, dropout=dropout, lse=True, dtype=dtype, device="cpu")
    call = partial(value_and_gradients, "attention", partial(attention, backend="cpu"), inputs)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for name, expected in results[0].items():
        assert all(torch.equal(result[name], expected) for result in results), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_documents_are_calls_of_their_own(level, dtype):
    starts = [0, 1, 150, 342, 343, 500]  # of one token, of less than a block, of more than one
    size = {"batch": 1, "queries": 500, "keys": 500, "heads": 2, "groups": 1, "width": 16}
    inputs = CASES.make(**size, documents=starts[1:-1], dtype=dtype, device="cpu")

    def apart(function, q, k, v, **rest):
        rest["document_ids"] = None
        bounds = pairwise(starts)
        return torch.cat([function(q[:, i:j], k[:, i:j], v[:, i:j], **rest) for i, j in bounds], 1)

    together = value_and_gradients("attention", partial(attention, backend="cpu"), inputs)
    oracle = partial(value_and_gradients, "attention", partial(apart, reference.attention))
    low, exact = oracle(inputs), oracle(double(inputs))
    ours = partial(apart, partial(attention, backend="cpu"))
    ours = value_and_gradients("attention", ours, inputs)
    for name, value in together.items():
        assert_as_accurate(name, value, low[name], exact[name])
        assert_as_accurate(name, ours[name], low[name], exact[name])


def test_scores_of_ten_thousand_overflow_nothing(level):
    size = {"batch": 1, "queries": 1500, "keys": 1500, "heads": 1, "groups": 1, "width": 16}
    inputs = CASES.make(**size, lse=True, dtype=torch.float32, device="cpu")
    out, lse = attention(**inputs, scale=1e3, backend="cpu")
    low = reference.attention(**inputs, scale=1e3)
    exact = reference.attention(**double(inputs), scale=1e3)
    assert lse.abs().max() > 1e4
    assert_as_accurate("out", out, low[0], exact[0])
    assert_as_accurate("lse", lse, low[1], exact[1])


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_scale_may_be_zero_or_negative(scale):
    inputs = CASES.make(**SEVERAL_BLOCKS, dtype=torch.float32, device="cpu")
    oracle = partial(value_and_gradients, "attention", partial(reference.attention, scale=scale))
    low, exact = oracle(inputs), oracle(double(inputs))
    call = partial(attention, scale=scale, backend="cpu")
    for name, value in value_and_gradients("attention", call, inputs).items():
        assert_as_accurate(name, value, low[name], exact[name])


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("clone", "copy")), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", FLOATS)
def test_heads_of_one_packed_projection_are_read_in_place(dtype):
    packed = torch.randn(2, 200, 4 + 2 + 2, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.to(dtype).split((4, 2, 2), dim=2)
    key_ranges = one_document(200, 200, causal=True)
    dense = [x.contiguous() for x in (q, k, v)]
    delta = torch.zeros(2, 4, 200)
    with NoCopies():
        out, lse = cpu.forward(q, k, v, key_ranges, 0.25, None)
        dqkv = cpu.backward(q, q, k, v, lse, delta, key_ranges, 0.25, None)
    expected = cpu.forward(*dense, key_ranges, 0.25, None)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    again = cpu.backward(dense[0], *dense, lse, delta, key_ranges, 0.25, None)
    assert all(torch.equal(*pair) for pair in zip(dqkv, again, strict=True))


def drawn(queries, keys, heads=4, groups=2, width=16, batch=2, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, width), *[(batch, keys, groups, width)] * 2]
    q, k, v = (torch.randn(s, generator=random).to(dtype) for s in shapes)
    dout = torch.randn(shapes[0], generator=random).to(dtype)
    return q, k, v, dout


def check_key_ranges(q, k, v, dout, key_ranges, dropout=None, parts=1):
    """Hold the kernels to the plain ones, the keys in so many parts, in float32."""
    scale = q.shape[-1] ** -0.5
    exact, lse = plain_attention.forward(
        q.double(), k.double(), v.double(), key_ranges, scale, dropout
    )
    low = exact.float()
    delta = (dout.double() * exact).sum(-1).transpose(1, 2).float()
    settings = {"lse": lse, "delta": delta, "key_ranges": key_ranges, "scale": scale}
    oracle = partial(plain_attention.backward, **settings)
    exact_grads = oracle(dout.double(), q.double(), k.double(), v.double(), dropout=dropout)
    outs, lses, grads, begin = [], [], [], 0
    for part in k.split(-(-k.shape[1] // parts), dim=1):
        end = begin + part.shape[1]
        here = KeyRanges(*((x.clamp(begin, end) - begin).int() for x in key_ranges[:2]))
        drops = dropout and dropout._replace(k_positions=dropout.k_positions[begin:end])
        inputs = q, part, v[:, begin:end]
        out, one = cpu.forward(*inputs, here, scale, drops, float32_out=True)
        settings = here, scale, drops
        grads.append(cpu.backward(dout, *inputs, lse, delta, *settings, float32_out=True))
        outs.append(out), lses.append(one)
        begin = end
    merged = torch.stack(lses).logsumexp(0)
    shares = [(one - merged).exp().nan_to_num(0).transpose(1, 2)[..., None] for one in lses]
    out = sum(o * share for o, share in zip(outs, shares, strict=True))
    assert torch.equal(merged == -torch.inf, lse == -torch.inf)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    assert_as_accurate("lse", merged.masked_fill(lse == -torch.inf, 0), finite, finite.double())
    rounded = q.dtype
    assert_as_accurate("out", out.to(rounded), low.to(rounded), exact)
    dq = sum(g[0] for g in grads)
    dk, dv = (torch.cat([g[i] for g in grads], dim=1) for i in (1, 2))
    for name, actual, true in zip(("dq", "dk", "dv"), (dq, dk, dv), exact_grads, strict=True):
        assert_as_accurate(name, actual.to(rounded), true.to(rounded), true)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (1, 1), (5, 5), (3, 9), (9, 3), (4, 0)])
def test_key_ranges_without_documents_need_no_search(queries, keys, causal):
    q, k = torch.empty(1, queries, 1, 2), torch.empty(1, keys, 1, 2)
    actual = one_document(queries, keys, causal=causal).tensors(q, k)
    positions = torch.arange(queries).int() + keys - queries, torch.arange(keys).int()
    for x, y in zip(actual, key_ranges_of(*positions, causal=causal)[:2], strict=True):
        assert torch.equal(x, y)
        assert x.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parts_of_the_keys_merge_into_the_whole(level, dtype, parts, dropout_p):
    """A ring reads the keys shard by shard, and takes gradients with the lse of all of them."""
    q, k, v, dout = drawn(290, 410, dtype=dtype)
    rows, columns = torch.arange(120, 410).int(), torch.arange(410).int()
    dropout = Dropout(dropout_p, torch.tensor(2**62 + 7), rows, columns) if dropout_p else None
    key_ranges = key_ranges_of(rows, columns, causal=True)
    check_key_ranges(q, k, v, dout, key_ranges, dropout, parts)


def test_any_query_may_have_no_key(level):
    """Empty ranges before, between and after others, and whole blocks of queries without a key."""
    end = torch.cat([torch.zeros(210), torch.full((100,), 300), torch.full((190,), 400)]).int()
    first = end - torch.cat([torch.zeros(210), torch.arange(100) % 2 * 300, torch.zeros(190)]).int()
    first = first.cummax(0).values
    q, k, v, dout = drawn(500, 450, dtype=torch.bfloat16)
    check_key_ranges(q, k, v, dout, KeyRanges(first[None], end[None]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_is_as_accurate_as_the_reference(data):
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    # Of a softmax of one key dq is 0, and so is its tolerance: some query must have several.
    queries, groups = draw(20, 260), draw(1, 3)
    documents = data.draw(st.booleans())
    keys = queries if documents else draw(20, 420)
    starts = sorted(draw(0, queries) for _ in range(draw(0, 4))) if documents else None
    size = {"batch": draw(1, 2), "queries": queries, "keys": keys, "width": 2 * draw(1, 20)}
    size |= {"heads": groups * draw(1, 4), "groups": groups, "causal": data.draw(st.booleans())}
    size |= {"documents": starts, "dropout": data.draw(st.sampled_from([0.0, 0.25]))}
    inputs = CASES.make(**size, dtype=torch.bfloat16, device="cpu")
    for name in data.draw(st.sets(st.sampled_from("qkv"))):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    with library.use_cpu_level(data.draw(st.sampled_from(library.cpu_levels()))):
        check(inputs | {"scale": 0.3 / size["width"] ** 0.5}, backend="cpu")


def test_a_query_whose_scores_round_coarsely_still_attends_to_its_best_key(level):
    """Scores of 1e10 are 1,024 apart in float32; a width of 96 makes their scale no power of 2."""
    q, k = (3e5 * drawn for drawn in torch.randn(2, 1, 64, 1, 96))
    best = (q[0, :, 0].double() @ k[0, :, 0].double().T).argmax(-1)
    out = attention(q, k, k, causal=False, backend="cpu")
    assert (out[0, :, 0] == k[0, best, 0]).all(-1).double().mean() > 0.9
    assert out.any(-1).all()


def test_dropout_reads_no_position_beyond_the_last_key(level):
    """The positions of keys end where memory does."""
    num_keys, page = 67, mmap.PAGESIZE
    positions = torch.arange(num_keys, dtype=torch.int32)
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    at_the_end = (ctypes.c_int32 * num_keys).from_address(start + page - 4 * num_keys)
    columns = torch.frombuffer(at_the_end, dtype=torch.int32).copy_(positions)
    q = torch.randn(1, num_keys, 2, 8)
    key_ranges = one_document(num_keys, num_keys, causal=True)
    dropout = Dropout(0.3, torch.tensor(1), positions, columns)
    out, lse = cpu.forward(q, q, q, key_ranges, 0.3, dropout)
    gradients = cpu.backward(out, q, q, q, lse, 0 * lse, key_ranges, 0.3, dropout)
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_more_heads_per_kv_head_than_the_kernel_takes_are_left_to_others():
    q, k = torch.randn(1, 3, 1100, 4), torch.randn(1, 3, 1, 4)
    with pytest.raises(NotImplementedError, match="more than 1024 query heads"):
        attention(q, k, k, backend="cpu")
    torch.testing.assert_close(attention(q, k, k), reference.attention(q, k, k, **PLAIN))


def test_documents_may_have_the_first_and_the_last_number_there_is():
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    x = torch.randn(1, 3, 1, 4)
    ids = torch.tensor([[low, high, high]], dtype=torch.int32)
    same = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    assert attention(x, x, x, document_ids=ids).equal(attention(x, x, x, document_ids=same))
    with pytest.raises(ValueError, match="must not decrease"):
        attention(x, x, x, document_ids=ids.flip(1))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_sdpa_masks_at_any_scale(scale):
    q = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    out = attention(q, q, q, scale=scale, backend="sdpa")
    torch.testing.assert_close(out, reference.attention(q, q, q, **PLAIN | {"scale": scale}))


def test_an_empty_batch_drops_nothing():
    x = torch.randn(0, 3, 2, 4, dtype=torch.float64)
    assert attention(x, x, x, dropout_p=0.5, backend="reference").shape == x.shape


def test_sdpa_says_what_it_cannot():
    size = {"batch": 1, "queries": 9, "keys": 9, "heads": 2, "groups": 1, "width": 8}
    plain = CASES.make(**size, dtype=torch.float32, device="cpu")
    check(plain, backend="sdpa")
    check(plain | {"causal": False}, backend="sdpa")
    longer = {name: torch.cat([plain[name]] * 2, dim=1) for name in "kv"}
    documents = {"document_ids": torch.zeros(1, 9, dtype=torch.int32)}
    for refused in ({"dropout_p": 0.1}, {"return_lse": True}, documents, longer):
        with pytest.raises(NotImplementedError, match="'sdpa' cannot run this call: it"):
            attention(**plain | refused, backend="sdpa")
