"""attention by flash-attn and xformers, neither of which can be installed without a GPU.

Fakes have the signatures of their public functions, as recorded from
flash_attn/flash_attn_interface.py (commit 0053002), xformers/ops/fmha/__init__.py (00afc12) and
attn_bias.py (deebdef) there, and compute by the definition: these tests hold the arguments that the
adapters pass. The libraries themselves are tested on a GPU, where they are installed.
"""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emu3_kernels import attention
from emu3_kernels.ops.attention import cudnn, flash_attn, optional, reference, xformers
from emu3_kernels.ops.attention.key_ranges import document_starts
from emu3_kernels.runtime import dispatch, launch
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients

CASES = cases("attention")
ADAPTERS = {"flash_attn": flash_attn, "xformers": xformers}
WITH_CUDNN = ADAPTERS | {"cudnn": cudnn}
TRY = {"flash_attn": "_try_2", "xformers": "_try", "cudnn": "_try"}
"""The tiny call of each adapter."""


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert deterministic
    assert dropout_p == 0
    return reference.attention(q, k, v, causal=causal, scale=softmax_scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert (cu_seqlens_q.diff().max(), max_seqlen_k) == (max_seqlen_q, max_seqlen_q)
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    rest = {"softmax_scale": softmax_scale, "causal": causal, "deterministic": deterministic}
    return torch.cat([flash_attn_func(*part, **rest) for part in parts], dim=1)[0]


class LowerTriangularFromBottomRightMask:
    pass


class BlockDiagonalMask:
    causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        mask = cls()
        mask.lengths = q_seqlen
        return mask

    def make_causal(self):
        self.causal = True
        return self


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    """The query heads of a KV head are a dimension of their own, and share its keys."""
    assert p == 0
    assert key.shape[3] == 1 or key.stride(3) == value.stride(3) == 0
    if isinstance(attn_bias, BlockDiagonalMask):
        assert query.shape[0] == 1
        causal, lengths = attn_bias.causal, attn_bias.lengths
    else:
        causal, lengths = attn_bias is not None, None
    parts = [x.flatten(2, 3).split(lengths or x.shape[1], dim=1) for x in (query, key, value)]
    outs = [
        reference.attention(*part, causal=causal, scale=scale) for part in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=1).view(query.shape)


def cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
):  # fmt: skip
    """As declared in torch's native_functions.yaml; heads are [B, H, T, K], and grouped."""
    assert (attn_bias, dropout_p, return_debug_mask) == (None, 0, False)
    assert scale > 0
    assert compute_log_sumexp or not torch.is_grad_enabled() or not query.requires_grad
    assert all(x.stride(3) == 1 for x in (query, key, value))
    heads = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = reference.attention(*heads, causal=is_causal, scale=scale, return_lse=True)
    return out.transpose(1, 2), lse[..., None]


@pytest.fixture
def adapter(monkeypatch, forget):
    """Return an adapter that finds a fake of its library."""
    flash = ModuleType("flash_attn")
    flash.flash_attn_func = flash_attn_func
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    ops, fmha = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha")
    ops.memory_efficient_attention = memory_efficient_attention
    bias = fmha.attn_bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalMask = BlockDiagonalMask
    bias.LowerTriangularFromBottomRightMask = LowerTriangularFromBottomRightMask
    for module in (flash, ops, fmha, bias, ModuleType("xformers")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cudnn, "cudnn_attention", cudnn_attention)
    for name, module in WITH_CUDNN.items():
        monkeypatch.setattr(module, TRY[name], partial(try_on_cpu, getattr(module, TRY[name])))
    return WITH_CUDNN.get


def try_on_cpu(original, device):
    original(torch.device("cpu"))


@pytest.fixture
def forget():
    """Let a library be imported and tried anew, before the test and after it."""
    optional._failure.cache_clear()
    yield
    optional._failure.cache_clear()


SIZES = [
    {"batch": 2, "queries": 5, "keys": 9, "heads": 4, "groups": 2, "width": 16},
    {"batch": 2, "queries": 7, "keys": 7, "heads": 3, "groups": 3, "width": 16, "causal": False},
    {"batch": 2, "queries": 13, "keys": 13, "heads": 4, "groups": 1, "width": 16,
     "documents": [1, 4]},
    {"batch": 2, "queries": 13, "keys": 13, "heads": 2, "groups": 1, "width": 16,
     "documents": [6], "causal": False},
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_the_arguments_mean_the_same(name, size, adapter):
    inputs = CASES.make(**size, dtype=torch.float32, device="cpu")
    call = {key: inputs[key] for key in ("q", "k", "v", "causal", "document_ids", "dropout_p")}
    call["scale"] = 0.3
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for the libraries themselves")
@pytest.mark.parametrize("size", CASES.check[2:])
@pytest.mark.parametrize("name", ["cudnn", "flash_attn", "xformers"])
def test_the_library_itself(name, size):
    inputs = CASES.make(
        **size | {"lse": False, "dropout": 0.0}, dtype=torch.bfloat16, device="cuda"
    )
    call = partial(attention, backend=name)
    try:
        call(**inputs)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    actual = value_and_gradients("attention", call, inputs)
    low = value_and_gradients("attention", reference.attention, inputs)
    exact = value_and_gradients("attention", reference.attention, double(inputs))
    for key, value in actual.items():
        assert_as_accurate(key, value, low[key], exact[key])


REFUSED = [
    ({"dtype": torch.float32}, "float32"),
    ({"dropout_p": 0.1}, "random numbers of its own"),
    ({"return_lse": True}, "lse has no gradient"),
    ({"keys": 0, "causal": False}, "no empty tensor"),
    ({"device": "cpu"}, "no kernel for a cpu tensor"),
]
CUDNN = [
    ({"dtype": torch.float32}, "no kernel for torch.float32"),
    ({"dropout_p": 0.1}, "random numbers of its own"),
    ({"return_lse": True, "gradient": True}, "lse has no gradient"),
    ({"gradient": True}, "do not repeat bit for bit"),
    ({"keys": 5}, "the first query with the first key"),
    ({"queries": 1, "keys": 1}, "two keys or more"),
    ({"width": 136}, "8 to 128 in steps of 8, got 136"),
    ({"width": 60}, "8 to 128 in steps of 8, got 60"),
    ({"device": "cpu"}, "no kernel for a cpu tensor"),
    ({"documents": True}, "takes no documents"),
]
FLASH = [({"width": 512}, "256 at most, got 512"), ({"queries": 1 << 24}, "32 bits")]
XFORMERS = [({"width": 512}, "256 at most, got 512"), ({"queries": 9}, "without a key")]


def reason(module, queries=4, keys=4, width=64, dtype=torch.bfloat16, device="cuda", gradient=False,
           causal=True, dropout_p=0.0, return_lse=False, documents=False):  # fmt: skip
    with FakeTensorMode():
        q = torch.empty(1, queries, 2, width, dtype=dtype, device=device, requires_grad=gradient)
        k = torch.empty(1, keys, 2, width, dtype=dtype, device=device)
        ids = torch.empty(1, queries, dtype=torch.int32, device=device) if documents else None
        return module.why_not(q, k, k, causal, ids, dropout_p, return_lse)


@pytest.mark.parametrize(
    ("name", "call", "why"),
    [(n, *case)
     for n, own in [("flash_attn", REFUSED + FLASH), ("xformers", REFUSED + XFORMERS),
                    ("cudnn", CUDNN)]
     for case in own],
)  # fmt: skip
def test_what_a_library_cannot_do_is_refused(name, call, why, adapter):
    module = adapter(name)
    assert reason(module) is None
    assert why in reason(module, **call)


def test_gradients_of_xformers_must_repeat(adapter):
    """Under torch.use_deterministic_algorithms, it leaves out its kernels that add in any order."""
    module, warns = adapter("xformers"), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.are_deterministic_algorithms_enabled()
    assert reason(module, gradient=True) is None
    torch.use_deterministic_algorithms(False)
    try:
        assert "use_deterministic_algorithms" in reason(module, gradient=True)
        assert reason(module) is None
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


@pytest.mark.parametrize("enabled", [True, False])
def test_deterministic_algorithms_leave_out_the_gradients_of_cudnn(enabled, adapter):
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        assert reason(adapter("cudnn")) is None
        assert (reason(adapter("cudnn"), gradient=True) is None) == (not enabled)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def test_cudnn_is_first_on_a_gpu_and_triton_takes_what_it_refuses(adapter, monkeypatch):
    """By measurement: cuDNN, flash-attn, Triton, xformers, what PyTorch chooses.

    Gluon is not measured.
    """
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    flash = replace(flash_attn.BACKENDS["attention"], why_not=lambda *_: "not here")
    backends = dispatch.backends("attention")
    order = [(name, flash if name == "flash_attn" else b) for name, b in backends._order[True]]
    monkeypatch.setitem(backends._order, True, tuple(order))
    names = [name for name, _ in order]
    order = ("cudnn", "flash_attn", "triton", "triton_gluon", "xformers", "sdpa")
    assert names == [name for name in order if name in names]
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 64, dtype=torch.float16, device="cuda")
        ids = torch.empty(1, 4, dtype=torch.int32, device="cuda")
        plain, packed = (q, q, q, True, None, 0.0, False), (q, q, q, True, ids, 0.0, False)
        assert backends._first(*plain)[0] == "cudnn"
        assert backends._first(*packed)[0] == "triton"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_flash_attention_3_runs_where_it_has_kernels(capability, adapter, monkeypatch):
    """Early versions return the lse too."""
    calls = []

    def dense(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        calls.append("dense")
        out = flash_attn_func(q, k, v, 0.0, softmax_scale, causal, deterministic=deterministic)
        return out, None

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings):
        calls.append("packed")
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return flash_attn_varlen_func(q, k, v, *lengths, **settings)

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


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_that_is_not_installed_is_named(name, forget, monkeypatch):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    q = torch.randn(1, 4, 2, 8)
    message = f"backend '{name}' cannot run this call: the package '{name}' is not installed"
    with pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, backend=name)


class Broken(ModuleType):
    """A package whose extension was built for another torch."""

    __path__ = ()

    def __getattr__(self, name):
        raise ImportError(f"undefined symbol: {name}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_that_fails_to_import_is_a_backend_that_cannot_run(name, forget, monkeypatch):
    for module in (name, f"{name}.ops"):
        monkeypatch.setitem(sys.modules, module, Broken(module))
    for _ in range(2):
        assert "its first use failed with ImportError" in reason(ADAPTERS[name])
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="undefined symbol"):
        attention(q, q, q, backend=name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_is_tried_once_and_refused_if_that_fails(name, adapter, monkeypatch):
    tries = []

    def unsupported(*args, **settings):
        tries.append(args)
        raise RuntimeError("no kernel image is available for this GPU")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", unsupported)
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", unsupported)
    for _ in range(2):
        assert "failed with RuntimeError: no kernel image" in reason(adapter(name))
    assert len(tries) == 1


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_is_tried_while_a_graph_is_traced(name, adapter, monkeypatch):
    """Traced, neither the import nor the tiny call may break the graph."""
    module = adapter(name)
    tried = getattr(module, TRY[name])
    monkeypatch.setattr(module, "why_not", lambda q, *_: optional.failure(tried, q.device))
    backend = replace(module.BACKENDS["attention"], why_not=module.why_not)
    monkeypatch.setitem(dispatch.backends("attention"), name, backend)
    torch.compiler.reset()
    q = torch.randn(1, 5, 2, 8)
    call = partial(attention, backend=name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q), call(q, q, q))


def test_documents_end_with_their_row():
    ids = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]], dtype=torch.int32)
    assert document_starts(ids).tolist() == [0, 2, 4, 7, 8]
    assert document_starts(ids).dtype == torch.int32
