"""What is special about decode_attention: what is read, how keys are split, where they may lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_kernels import decode_attention
from emu3_kernels.ops.attention import reference
from emu3_kernels.ops.attention.cases import paged
from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import at_level, backends, cases, double, runnable

CASES = cases("decode_attention")
BACKENDS = [backend for backend in backends("decode_attention") if backend != "cuda"]
"""CUDA C++ runs on tensors on a GPU alone, and on a CPU under tests/gates/fibers."""
CPU = [backend for backend in BACKENDS if backend.startswith("cpu@")]


def call(backend, inputs):
    name, level = at_level(backend)
    with level:
        return decode_attention(**inputs, backend=name)


def make(dtype=torch.float32, **size):
    stated = {"batch": 1, "new": 1, "heads": 2, "groups": 1, "width": 64}
    return CASES.make(**stated | size, dtype=dtype, device="cpu")


def check(backend, inputs):
    """Hold a call to the reference; what it may not read is NaN there and here."""
    low = reference.decode_attention(**inputs)
    exact = reference.decode_attention(**double(inputs))
    assert not exact.isnan().any()
    assert_as_accurate("out", call(backend, inputs), low, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 63, 64, 65, 256, 257, 513])
def test_blocks_and_pieces_and_a_key(backend, capacity):
    """A block is 32 or 64 keys, a split of the CPU kernel 256."""
    check(backend, make(capacity=capacity))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (8, 1), (4, 4), (7, 1)])
@pytest.mark.parametrize("new", [1, 3, 16, 33])
def test_every_number_of_queries_that_share_a_key(backend, heads, groups, new):
    """From 1 to 264: tiles of 4, 2 and 1, and more than the rows of one dot."""
    check(backend, make(new=new, heads=heads, groups=groups, capacity=70, dtype=torch.float32))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 24, 32, 40, 96, 256])
def test_every_head_width_on_a_cpu(backend, width, dtype):
    check(backend, make(dtype, batch=2, new=2, width=width, capacity=77, lengths=[77, 1]))


@st.composite
def calls(draw):
    page = draw(st.sampled_from([None, 1, 5, 16]))
    batch = draw(st.integers(1, 3))
    capacity = draw(st.integers(1, 12)) * (page or 13)
    groups = draw(st.sampled_from([1, 2, 3]))
    return {
        "batch": batch,
        "new": draw(st.integers(1, 64)),
        "capacity": capacity,
        "heads": groups * draw(st.sampled_from([1, 2, 4, 5])),
        "groups": groups,
        "width": draw(st.sampled_from([16, 64])),
        "lengths": draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch)),
        "page": page,
        "tree": draw(st.booleans()),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=calls())
def test_any_lengths_and_pages(backend, size):
    check(backend, CASES.make(**size, dtype=runnable(backend, torch.bfloat16), device="cpu"))


@pytest.mark.parametrize("backend", CPU)
def test_the_number_of_threads_changes_nothing(backend):
    inputs = make(torch.bfloat16, batch=2, capacity=2000, heads=4, lengths=[2000, 700])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(backend, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_a_cache_is_read_in_place(backend):
    """Views of ``[L, B, S, KV, K]``, and heads outside the positions; none is copied."""
    inputs = make(batch=2, capacity=300, heads=4, groups=2, lengths=[300, 41])
    expected = call(backend, inputs)
    caches = torch.stack([torch.full_like(inputs["k_cache"], torch.nan), inputs["k_cache"]])
    outside = inputs["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    views = inputs | {"k_cache": caches[1], "v_cache": outside}
    with torch.profiler.profile() as profile:
        actual = call(backend, views)
    assert torch.equal(actual, expected)
    ran = {event.key for event in profile.key_averages()}
    # Triton's interpreter itself copies every tensor of a launch with copy_.
    assert not ran & {"aten::contiguous", "aten::clone"}, ran


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_hold_what_a_plain_cache_does(backend):
    plain = make(torch.float32, batch=2, new=3, capacity=192, heads=4, lengths=[192, 100])
    random = torch.Generator().manual_seed(3)
    k, v, table = paged(plain["k_cache"], plain["v_cache"], 32, random)
    assert not torch.equal(table, table.sort().values)
    inputs = plain | {"k_cache": k, "v_cache": v, "page_table": table}
    strided = inputs | {"page_table": table.repeat_interleave(2, dim=1)[:, ::2]}
    expected = call(backend, plain)
    assert torch.equal(call(backend, inputs), expected)
    assert torch.equal(call(backend, strided), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_new_tokens_are_causal_among_themselves(backend):
    """One by one, each after a key more, they get what they get together."""
    inputs = make(new=5, capacity=40, heads=2)
    together = call(backend, inputs)
    for i in range(5):
        alone = inputs | {
            "q": inputs["q"][:, i : i + 1],
            "lengths": inputs["lengths"] - 4 + i,
        }
        torch.testing.assert_close(call(backend, alone), together[:, i : i + 1])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_query_without_a_key_gets_zero(backend):
    out = call(backend, make(batch=2, new=3, capacity=8, lengths=[0, 1]))
    assert out[0].eq(0).all()
    assert out[1, :2].eq(0).all()
    assert out[1, 2].ne(0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_large_scores_do_not_overflow(backend):
    inputs = make(capacity=300)
    inputs["q"] *= 1e4
    check(backend, inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_nan_among_the_keys_is_not_masked(backend):
    inputs = make(capacity=600, heads=2)
    inputs["k_cache"][0, 17, 0, 3] = torch.nan
    assert call(backend, inputs).isnan().all()


def test_bad_arguments_are_named():
    inputs = make(batch=2, capacity=8, heads=4, groups=2)

    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            decode_attention(**inputs | changes)

    q, k, lengths = inputs["q"], inputs["k_cache"], inputs["lengths"]
    table = torch.zeros(2, 3, dtype=torch.int32)
    refused(ValueError, r"q must be \[B, t, H, K\] and the caches alike", q=q[..., :6])
    refused(ValueError, "and the caches alike", v_cache=k[:, :4])
    refused(ValueError, "and the caches alike", q=q.double())
    refused(TypeError, "q must be floating point", q=q.int())
    refused(ValueError, "new tokens must be 1 to 64, got 65", q=q.expand(2, 65, 4, 64))
    refused(ValueError, "3 query heads must be a multiple", q=q[:, :, :3])
    refused(ValueError, "a row for each of the 2 of q, got 1", k_cache=k[:1], v_cache=k[:1])
    words = torch.ones(2, 1, dtype=torch.int64)
    refused(TypeError, "mask must be int64, got torch.uint64", mask=words.view(torch.uint64))
    refused(ValueError, r"mask must be \(2, 1\)", mask=words[:, 0])
    refused(TypeError, "lengths must be int32", lengths=lengths.long())
    refused(ValueError, r"lengths must be \(2,\)", lengths=lengths[:1])
    longer, other = lengths.clone(), table.clone()
    longer[1], other[1, 0] = 9, 2
    for backend in (None, "reference"):
        asked = {"backend": backend}
        refused(ValueError, r"lengths must lie in \[0, 8\], got.* 9", lengths=longer, **asked)
        refused(ValueError, r"lengths must lie in \[0, 8\], got -1", lengths=lengths - 9, **asked)
        refused(ValueError, r"pages must lie in \[0, 2\), got.* 2", page_table=other, **asked)
    refused(TypeError, "page_table must be int32", page_table=table.long())
    refused(ValueError, r"page_table must be \[2, max_pages\]", page_table=table[:1])
    refused(ValueError, "has no gradient", q=q.clone().requires_grad_())


@pytest.mark.skipif(not CPU, reason="the native library was not built")
def test_the_cpu_kernel_checks_values_that_a_traced_call_could_not():
    q, cache = torch.randn(1, 1, 1, 8), torch.randn(2, 4, 1, 8)
    op = torch.ops.emu3_kernels.decode_attention
    lengths, table = torch.tensor([5], dtype=torch.int32), torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 4\], got 5"):
        op(q, cache[:1], cache[:1], lengths, None, None, 1.0)
    with pytest.raises(ValueError, match=r"pages must lie in \[0, 2\), got 2"):
        op(q, cache, cache, lengths, table, None, 1.0)


def test_a_backend_that_cannot_run_says_why():
    inputs = make(capacity=8)
    swapped = inputs["k_cache"].transpose(2, 3).contiguous().transpose(2, 3).expand(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match="without unit stride in K"):
        decode_attention(**inputs | {"k_cache": swapped[..., ::2], "v_cache": swapped[..., ::2],
                                     "q": inputs["q"][..., ::2]}, backend="cpu")  # fmt: skip
    if not library.MISSING:
        with pytest.raises(NotImplementedError, match="float64 is left to the reference"):
            decode_attention(**double(inputs) | {"scale": 1.0}, backend="cpu")


@pytest.mark.parametrize("size", CASES.check)
def test_sdpa_a_row_at_a_time(size):
    inputs = CASES.make(**size, dtype=torch.float32, device="cpu")
    if inputs["page_table"] is None and "mask" not in inputs:
        check("sdpa", inputs)
    else:
        why = "'sdpa' cannot run this call: (it reads no pages|a mask of the new tokens is left)"
        with pytest.raises(NotImplementedError, match=why):
            call("sdpa", inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("caches", [(3, 0), (0, 16)])
def test_rows_without_keys_need_no_pages(backend, caches):
    pages, length = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    empty = torch.randn(*caches, 1, 4)
    inputs = {"k_cache": empty, "v_cache": empty, "lengths": length, "page_table": pages}
    assert not call(backend, {"q": torch.randn(1, 1, 2, 4), **inputs}).any()
