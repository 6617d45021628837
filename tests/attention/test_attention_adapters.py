"""attention by flash-attn, xformers and PyTorch's own kernels of a GPU: what they are given.

None of them runs here: fakes compute by the definition. The libraries themselves are tested on a
GPU, where they are installed.
"""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from emu3_kernels import Documents, attention
from emu3_kernels.ops.attention import cudnn, flash_attn, key_ranges, reference, torch_flash
from emu3_kernels.ops.attention.key_ranges import document_starts
from emu3_kernels.runtime import dispatch
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients
from tests.attention import library_fakes as fakes

CASES = cases("attention")
SIZES = [
    {"batch": 2, "queries": 5, "keys": 9, "heads": 4, "groups": 2, "width": 16},
    {"batch": 2, "queries": 7, "keys": 7, "heads": 3, "groups": 3, "width": 16, "causal": False},
    {"batch": 2, "queries": 13, "keys": 13, "heads": 4, "groups": 1, "width": 16,
     "documents": [1, 4]},
    {"batch": 2, "queries": 13, "keys": 13, "heads": 2, "groups": 1, "width": 16,
     "documents": [6], "causal": False},
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("name", ["flash_attn", "torch_flash", "xformers"])
def test_the_arguments_mean_the_same(name, scale, size, adapter):
    inputs = CASES.make(**size, dtype=torch.float32, device="cpu")
    call = {key: inputs[key] for key in ("q", "k", "v", "causal", "document_ids", "dropout_p")}
    call["scale"] = scale
    actual = value_and_gradients("attention", adapter(name).attention, call)
    low = value_and_gradients("attention", reference.attention, call)
    exact = value_and_gradients("attention", reference.attention, double(call))
    for key, value in actual.items():
        assert_as_accurate(key, value, low[key], exact[key])


@pytest.mark.parametrize("size", SIZES[1:2])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
def test_the_arguments_of_cudnn_mean_the_same(size, scale, adapter):
    inputs = CASES.make(**size | {"groups": 1}, dtype=torch.float32, device="cpu")
    call = {key: inputs[key] for key in ("q", "k", "v", "causal")} | {"scale": scale}
    for causal in (True, False):
        call["causal"] = causal
        actual = value_and_gradients("attention", adapter("cudnn").attention, call)
        low = value_and_gradients("attention", reference.attention, call)
        exact = value_and_gradients("attention", reference.attention, double(call))
        for key, value in actual.items():
            assert_as_accurate(key, value, low[key], exact[key])
    out, lse = cudnn.attention(**call, return_lse=True)
    expected = reference.attention(**call, return_lse=True)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("size", [SIZES[0] | {"queries": 9}, *SIZES[1:]])
def test_the_lse_of_torch_flash_is_that_of_its_rows(size, adapter):
    inputs = CASES.make(**size, dtype=torch.float32, device="cpu")
    call = {key: inputs[key] for key in ("q", "k", "v", "causal", "document_ids")}
    call |= {"scale": 0.3, "return_lse": True}
    actual, expected = adapter("torch_flash").attention(**call), reference.attention(**call)
    torch.testing.assert_close(actual, expected)
    call["q"].requires_grad_()
    out, lse = torch_flash.attention(**call)
    (dq,) = torch.autograd.grad(out.sum(), call["q"])
    (low,) = torch.autograd.grad(reference.attention(**call)[0].sum(), call["q"])
    torch.testing.assert_close((lse, dq), (expected[1], low))


@pytest.mark.parametrize("documents", [False, True])
def test_the_op_of_the_installed_torch_takes_these_arguments(documents):
    """And returns these shapes, with a gradient of the result alone: torch's meta functions."""
    on = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    q, k = torch.empty(2, 7, 4, 64, **on), torch.empty(2, 7, 2, 64, **on)
    ids = None
    if documents:
        ids = Documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).int())
        starts, longest = ids.packed
        assert (starts.tolist(), longest) == ([0, 3, 7, 8, 14], 6)
        ids.packed = starts.to("meta"), longest
    settings = {"causal": True, "document_ids": ids, "scale": 0.5, "return_lse": True}
    out, lse = torch_flash.attention(q, k, k, **settings)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype, lse.requires_grad) == ((2, 4, 7), torch.float32, False)
    gradients = torch.autograd.grad(out, (q, k), torch.empty_like(out))
    assert [g.shape for g in gradients] == [q.shape, k.shape]


@pytest.mark.parametrize("name", ["flash_attn", "torch_flash", "xformers"])
def test_documents_are_searched_once_for_all_layers(name, adapter, monkeypatch):
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]], dtype=torch.int32)
    documents, searches = Documents(ids), []

    def search(ids):
        searches.append(ids)
        return document_starts(ids)

    monkeypatch.setattr(key_ranges, "document_starts", search)
    backend = replace(adapter(name).BACKENDS["attention"], why_not=lambda *_: None)
    monkeypatch.setitem(dispatch.backends("attention"), name, backend)
    q = torch.randn(2, 5, 2, 8)
    expected = attention(q, q, q, document_ids=ids, backend="reference")
    for _ in range(3):
        out = attention(q, q, q, document_ids=documents, backend=name)
        torch.testing.assert_close(out, expected)
    assert len(searches) == 1
    attention(q, q, q, document_ids=documents, backend="reference")


@pytest.mark.parametrize("cut", ["strided", "offset", "odd rows"])
@pytest.mark.parametrize("name", ["cudnn", "flash_attn", "torch_flash"])
def test_a_kernel_gets_heads_of_16_byte_vectors(name, cut, adapter, monkeypatch):
    """At other addresses its loads are errors of the GPU, after which a process has no GPU."""
    given = []

    def recorded(function):
        def call(*args, **settings):
            given.extend(args[:3])
            return function(*args, **settings)

        return call

    monkeypatch.setattr(cudnn, "cudnn_attention", recorded(fakes.cudnn_attention))
    monkeypatch.setattr(torch_flash, "flash_attention", recorded(fakes.torch_flash_attention))
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_func", recorded(fakes.flash_attn_func)
    )
    whole, odd = (torch.randn(2, 5, 3, n, dtype=torch.float16) for n in (24, 20))
    x = {"strided": whole[..., :16:2], "offset": whole[..., 1:9], "odd rows": odd[..., :8]}[cut]
    settings = {"causal": True, "document_ids": None, "scale": 0.5}
    module = adapter(name)
    module.attention(x, x, x, **settings)
    assert all(n.data_ptr() % 16 == 0 and n.stride(-1) == 1 for n in given[-3:])
    assert all(n * 2 % 16 == 0 for x in given[-3:] for n in x.stride()[:3])
    packed = torch.randn(2, 5, 5, 8, dtype=torch.float16).split([3, 1, 1], 2)
    module.attention(*packed, **settings)
    starts = [x.data_ptr() for x in given[-3:]]
    assert starts == [x.data_ptr() for x in packed], "aligned views are copied"


MODE = {"cudnn": 0, "flash_attn": 0, "torch_flash": 2, "xformers": 2}
"""The deterministic mode of torch in which an adapter gives gradients."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for the libraries themselves")
@pytest.mark.parametrize("size", CASES.check[2:])
@pytest.mark.parametrize("name", MODE)
def test_the_library_itself(name, size, deterministic):
    inputs = CASES.make(
        **size | {"lse": False, "dropout": 0.0}, dtype=torch.bfloat16, device="cuda"
    )
    call = partial(attention, backend=name)
    try:
        with deterministic(MODE[name]):
            actual = value_and_gradients("attention", call, inputs)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    low = value_and_gradients("attention", reference.attention, inputs)
    exact = value_and_gradients("attention", reference.attention, double(inputs))
    for key, value in actual.items():
        assert_as_accurate(key, value, low[key], exact[key])


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_flash_attention_3_runs_where_it_has_kernels(capability, adapter, monkeypatch):
    """Early versions return the lse too."""
    calls = []

    def dense(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        calls.append("dense")
        out = fakes.flash_attn_func(
            q, k, v, 0.0, softmax_scale, causal, deterministic=deterministic
        )
        return out, None

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings):
        calls.append("packed")
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return fakes.flash_attn_varlen_func(q, k, v, *lengths, **settings)

    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_func, interface.flash_attn_varlen_func = dense, packed
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = torch.randn(1, 5, 2, 8)
    ids = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
    for document_ids in (None, ids):
        settings = {"causal": True, "document_ids": document_ids, "scale": 0.5}
        expected = reference.attention(q, q, q, **settings)
        torch.testing.assert_close(flash_attn.attention(q, q, q, **settings), expected)
    assert set(calls) == ({"dense", "packed"} if capability == (9, 0) else set())


def test_documents_end_with_their_row():
    ids = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]], dtype=torch.int32)
    assert document_starts(ids).tolist() == [0, 2, 4, 7, 8]
    assert document_starts(ids).dtype == torch.int32
