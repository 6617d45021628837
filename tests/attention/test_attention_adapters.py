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
from emu3_kernels.ops.attention import flash_attn, optional, reference, xformers
from emu3_kernels.ops.attention.key_ranges import document_starts
from emu3_kernels.runtime import dispatch
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients

CASES = cases("attention")
ADAPTERS = {"flash_attn": flash_attn, "xformers": xformers}


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
    for module in ADAPTERS.values():
        monkeypatch.setattr(module, "_try", partial(try_on_cpu, module._try))
    return ADAPTERS.get


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for the libraries themselves")
@pytest.mark.parametrize("size", CASES.check[2:])
@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
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
FLASH = [({"width": 512}, "256 at most, got 512"), ({"queries": 1 << 24}, "32 bits")]
XFORMERS = [({"width": 512}, "256 at most, got 512"), ({"queries": 9}, "without a key")]


def reason(module, queries=4, keys=4, width=64, dtype=torch.bfloat16, device="cuda", gradient=False,
           causal=True, dropout_p=0.0, return_lse=False):  # fmt: skip
    with FakeTensorMode():
        q = torch.empty(1, queries, 2, width, dtype=dtype, device=device, requires_grad=gradient)
        k = torch.empty(1, keys, 2, width, dtype=dtype, device=device)
        return module.why_not(q, k, k, causal, None, dropout_p, return_lse)


@pytest.mark.parametrize(
    ("name", "call", "why"),
    [(n, *case) for n, own in [("flash_attn", FLASH), ("xformers", XFORMERS)]
     for case in REFUSED + own],
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
    monkeypatch.setattr(module, "why_not", lambda q, *_: optional.failure(module._try, q.device))
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
