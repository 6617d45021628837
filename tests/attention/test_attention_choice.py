"""Which calls of attention go to another library: refusals, the order, a first try, determinism."""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emu3_kernels import attention
from emu3_kernels.ops.attention import optional, sdpa
from emu3_kernels.runtime import dispatch, launch
from tests.attention.library_fakes import ADAPTERS, ALL, TRY

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
TORCH_FLASH = [
    ({"dtype": torch.float32}, "no kernel for torch.float32"),
    ({"dropout_p": 0.1}, "random numbers of its own"),
    ({"return_lse": True, "gradient": True}, "lse of PyTorch's FlashAttention has no gradient"),
    ({"return_lse": True, "queries": 5}, "an lse of inf for a query without a key"),
    ({"keys": 0, "causal": False}, "no empty tensor"),
    ({"width": 200}, "8 to 192 in steps of 8, got 200"),
    ({"width": 60}, "8 to 192 in steps of 8, got 60"),
    ({"queries": 1 << 24}, "32 bits"),
    ({"device": "cpu"}, "no kernel for a cpu tensor"),
]
TAKEN = [
    {"documents": True}, {"return_lse": True}, {"keys": 9}, {"queries": 9},
    {"queries": 9, "causal": False, "return_lse": True}, {"documents": True, "return_lse": True},
]  # fmt: skip
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
                    ("cudnn", CUDNN), ("torch_flash", TORCH_FLASH)]
     for case in own],
)  # fmt: skip
def test_what_a_library_cannot_do_is_refused(name, call, why, adapter):
    module = adapter(name)
    assert reason(module) is None
    assert why in reason(module, **call)


@pytest.mark.parametrize("call", TAKEN, ids=str)
def test_torch_flash_takes_documents_and_gives_the_lse(call, adapter, deterministic):
    with deterministic(0):
        assert reason(adapter("torch_flash"), **call) is None
        if "return_lse" not in call:
            assert reason(adapter("torch_flash"), **call, gradient=True) is None


REPEATS = {
    "cudnn": (True, False, False),  # never: it runs where nobody asks for it
    "flash_attn": (True, True, True),  # always
    "torch_flash": (True, False, True),  # on demand, as PyTorch's others
    "sdpa": (True, False, True),
    "xformers": (False, False, True),
}
"""Whether an adapter gives gradients in each deterministic mode of torch: off, warns, on."""


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("name", REPEATS)
def test_gradients_repeat_where_deterministic_algorithms_are_asked_for(
    name, mode, adapter, deterministic
):
    """PyTorch's kernels that add in any order only warn where ``warn_only`` is set."""
    module = adapter(name) or sdpa
    with deterministic(mode):
        assert reason(module) is None
        assert (reason(module, gradient=True) is None) == REPEATS[name][mode]


@pytest.mark.parametrize("mode", [1, 2])
def test_a_deterministic_backend_is_chosen_where_one_is_asked_for(
    mode, adapter, deterministic, monkeypatch
):
    """Triton; without it, PyTorch's FlashAttention if it repeats, and else the reference."""
    backends = dispatch.backends("attention")
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    for left_out, expected in [
        ((), "triton"),
        (("triton", "triton_gluon"), ("reference", "torch_flash")[mode - 1]),
    ]:
        with monkeypatch.context() as patch, deterministic(mode), FakeTensorMode():
            patch.setitem(backends._order, True, order_without("flash_attn", *left_out))
            q = torch.empty(1, 4, 2, 64, dtype=torch.float16, device="cuda", requires_grad=True)
            assert backends._first(q, q, q, True, None, 0.0, False)[0] == expected


def order_without(*names: str) -> tuple:
    order = dispatch.backends("attention")._order[True]
    return tuple(pair for pair in order if pair[0] not in names)


def test_a_first_use_in_inference_mode_decides_nothing(forget):
    """The tiny call has a backward pass, which inference mode refuses."""

    def tiny(device):
        x = torch.zeros(1, device=device, requires_grad=True)
        (2 * x).backward()

    with torch.inference_mode():
        assert optional.failure(tiny, torch.device("cpu")) is None


def test_cudnn_is_first_on_a_gpu_and_triton_takes_what_it_refuses(adapter, monkeypatch):
    """By measurement: cuDNN, flash-attn, Triton, what PyTorch brings, xformers, its own choice."""
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    backends = dispatch.backends("attention")
    names = [name for name, _ in backends._order[True]]
    measured = "cudnn", "flash_attn", "triton", "triton_gluon", "torch_flash", "xformers", "sdpa"
    assert names == [name for name in measured if name in names]
    monkeypatch.setitem(backends._order, True, order_without("flash_attn"))
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 64, dtype=torch.float16, device="cuda")
        ids = torch.empty(1, 4, dtype=torch.int32, device="cuda")
        plain, packed = (q, q, q, True, None, 0.0, False), (q, q, q, True, ids, 0.0, False)
        assert backends._first(*plain)[0] == "cudnn"
        assert backends._first(*packed)[0] == "triton"
        monkeypatch.setitem(
            backends._order, True, order_without("flash_attn", "triton", "triton_gluon")
        )
        assert backends._first(*packed)[0] == "torch_flash"


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


@pytest.mark.parametrize("name", ALL)
def test_a_library_is_tried_while_a_graph_is_traced(name, adapter, monkeypatch):
    """Traced, neither the import nor the tiny call may break the graph."""
    module = adapter(name)
    tried = getattr(module, TRY[name])

    def why_not(q, *_):
        assert optional.determinism() == 1
        return optional.failure(tried, q.device)

    monkeypatch.setattr(module, "why_not", why_not)
    backend = replace(module.BACKENDS["attention"], why_not=module.why_not)
    monkeypatch.setitem(dispatch.backends("attention"), name, backend)
    torch.compiler.reset()
    q = torch.randn(1, 5, 2, 8)
    call = partial(attention, backend=name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q), call(q, q, q))
