"""attention in Gluon: emulated on a CPU, since Triton does not interpret Gluon.

The emulator must see what goes wrong on a GPU: faults of each kind are put into the kernel.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

from triton.runtime.jit import JITFunction

from emu3_kernels import attention
from emu3_kernels.ops.attention import (
    reference,
    triton_gluon,
    triton_gluon_blackwell,
    triton_gluon_kernel,
)
from emu3_kernels.ops.attention.key_ranges import document_ranges, one_document
from emu3_kernels.runtime.launch import Gpu, assume_gpu, gpu_of
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import device_of

DEVICE = device_of("triton_gluon")
SCALE = 0.125
PLAIN = True, None, 0.0, False


def refusal(q: torch.Tensor, *rest: object) -> str | None:
    return triton_gluon.why_not(q, q, q, *(rest or PLAIN))


def tokens(
    num_tokens: int, num_heads: int, dtype: torch.dtype = torch.float16, head_dim: int = 64
) -> torch.Tensor:
    random = torch.Generator().manual_seed(num_heads)
    return torch.randn(2, num_tokens, num_heads, head_dim, generator=random).to(DEVICE, dtype)


@contextmanager
def gpu_of_capability(capability: int) -> Iterator[None]:
    """Let the emulator run the kernels of that GPU; on another GPU, skip the test."""
    with assume_gpu(Gpu(warp_size=32, num_sms=4, capability=capability)):
        if reason := refusal(tokens(1, 1)):
            (pytest.skip if DEVICE == "cuda" else pytest.fail)(reason)
        if (here := gpu_of(tokens(1, 1)).capability) != capability:
            pytest.skip(f"the kernel is for sm_{capability}, got sm_{here}")
        yield


@pytest.fixture(params=triton_gluon.TILES, autouse=True)
def capability(request: pytest.FixtureRequest) -> Iterator[int]:
    with gpu_of_capability(request.param):
        yield request.param


def check_forward(
    num_queries: int,
    num_keys: int,
    starts: tuple = (),
    dtype: torch.dtype = torch.float16,
    head_dim: int = 64,
) -> None:
    """Two sequences of two heads that share keys; ``starts`` are those of documents."""
    q, k = (
        tokens(length, num_heads, dtype, head_dim)
        for length, num_heads in ((num_queries, 2), (num_keys, 1))
    )
    ranges, ids = one_document(num_queries, num_keys, causal=True), None
    if starts:
        where = torch.arange(num_queries, device=DEVICE)
        ids = torch.searchsorted(torch.tensor(starts, device=DEVICE), where, right=True)
        ids = ids.int().expand(2, -1)
        ranges = document_ranges(ids, causal=True)
    out, lse = triton_gluon.forward(q, k, k.neg(), ranges, SCALE, None)
    settings = {"document_ids": ids, "scale": SCALE, "return_lse": True}
    low = reference.attention(q, k, k.neg(), **settings)
    exact = reference.attention(q.double(), k.double(), k.neg().double(), **settings)
    assert_as_accurate("out", out, low[0], exact[0])
    assert_as_accurate("lse", lse, low[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "starts"),
    [(150, 700, ()), (400, 400, (1, 130, 140, 390)), (300, 300, (150,))],
    ids=["more blocks than stages", "documents", "a document inside a block"],
)
def test_blocks_of_keys_pass_through_the_stages_in_turn(num_queries, num_keys, starts, dtype):
    check_forward(num_queries, num_keys, starts, dtype)


def test_heads_of_128_take_two_parts_of_a_row():
    check_forward(200, 300, head_dim=128)


DONE = "        acc = warpgroup_mma_wait(0, (acc,))\n"
FREED = "        mbarrier.arrive(v_free.index(before), count=1)\n"
OVERTAKING = "        mbarrier.wait(v_free.index(stage), phase ^ 1)\n"
FIRST_KEYS = "        if nth == STAGES:\n            mbarrier.wait(v_free.index(0), 0)\n"
READY = "        mbarrier.arrive(p_full, count=1)\n"
RESCALED = "                sums.store(sums.load(ROWS) * alpha[:, None])\n"
READ = "                mbarrier.wait(p_full.index(group), nth & 1)\n"
SUM = "                tcgen05_mma(p, values, acc.index(group), mbarriers=[free])\n"
NEXT_KEYS = "                mbarrier.wait(k_full.index(after), phase_after)\n"
KERNEL, BLACKWELL = "triton_gluon_kernel", "triton_gluon_blackwell"
FAULTS = [
    pytest.param(90, KERNEL, DONE + FREED, FREED + DONE, id="freed before they are multiplied"),
    pytest.param(90, KERNEL, "        mbarrier.wait(v_full.index(before), phase_before)\n", "",
                 id="no wait"),
    pytest.param(90, KERNEL, OVERTAKING, "", id="overtaking"),
    pytest.param(90, KERNEL, FIRST_KEYS, "", id="overtaking the first keys"),
    pytest.param(90, KERNEL, "mbarrier.init(v_free.index(stage), count=2)",
                 "mbarrier.init(v_free.index(stage), count=1)", id="one group frees for both"),
    pytest.param(90, KERNEL,
                 "        acc *= gl.convert_layout(alpha, gl.SliceLayout(1, OUT), "
                 "assert_trivial=True)[:, None]\n",
                 "", id="sums of an earlier maximum"),
    pytest.param(90, KERNEL, "nth // STAGES & 1\n        before", "nth & 1\n        before",
                 id="wrong phase"),
    pytest.param(90, KERNEL, "warpgroup_mma_wait(1, (scores", "warpgroup_mma_wait(2, (scores",
                 id="in flight"),
    pytest.param(100, KERNEL, OVERTAKING, "", id="overtaking, tcgen05"),
    pytest.param(100, KERNEL, FIRST_KEYS, "", id="overtaking the first keys, tcgen05"),
    pytest.param(100, BLACKWELL, "v_free.index(stage), count=4", "v_free.index(stage), count=2",
                 id="one group frees for both, tcgen05"),
    pytest.param(100, BLACKWELL, "mbarriers=[full, free]", "mbarriers=[full]", id="never freed"),
    pytest.param(100, BLACKWELL, "            mbarrier.wait(v_full.index(stage), phase)\n", "",
                 id="no wait for values"),
    pytest.param(100, BLACKWELL, NEXT_KEYS, "", id="no wait for keys"),
    pytest.param(100, BLACKWELL, READ, "", id="no wait for probabilities"),
    pytest.param(100, BLACKWELL, READ, READ.replace("nth & 1", "0"), id="wrong phase, tcgen05"),
    pytest.param(100, BLACKWELL, "(nth + 1) // STAGES & 1", "(nth + 1) & 1", id="wrong stage"),
    pytest.param(100, BLACKWELL, "complete too.\n        mbarrier.wait(scores_full, nth & 1)\n",
                 "complete too.\n", id="scores in flight"),
    pytest.param(100, BLACKWELL, "> 0:\n        mbarrier.wait(scores_full, nth & 1)\n",
                 "> 0:\n        nth += 0\n", id="sums in flight"),
    pytest.param(100, BLACKWELL, RESCALED, "", id="sums not rescaled"),
    pytest.param(100, BLACKWELL, RESCALED + READY, READY + "        if nth > 0:\n" + RESCALED,
                 id="arrived before the sums are rescaled"),
]  # fmt: skip


def module_of(source: str, name: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(DEVICE == "cuda", reason="a fault may hang a GPU")
@pytest.mark.parametrize(
    ("capability", "module", "right", "wrong"), FAULTS, indirect=["capability"]
)
def test_a_fault_in_the_kernel_is_seen(capability, module, right, wrong, tmp_path, monkeypatch):
    """Both kernels use functions of the first module."""
    original = {KERNEL: triton_gluon_kernel, BLACKWELL: triton_gluon_blackwell}[module]
    source = Path(original.__file__).read_text()
    assert source.count(right) == 1
    faulty = module_of(source.replace(right, wrong), "faulty_kernel", tmp_path)
    for user in (triton_gluon_blackwell, original):
        for name, function in vars(original).items():
            if isinstance(function, JITFunction) and vars(user).get(name) is function:
                monkeypatch.setattr(user, name, vars(faulty)[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check_forward(1, 700)


def test_a_packed_projection_is_read_in_place_and_other_layouts_are_copied():
    packed = torch.randn(2, 8, 4 * 64, device=DEVICE).half().unflatten(2, (4, 64))
    q, k, _ = packed.split((2, 1, 1), dim=2)
    assert triton_gluon.described(q) is q
    assert triton_gluon.described(k) is k
    assert triton_gluon.descriptor(k, 128).strides == [256, 1]
    shifted = torch.randn(2 * 8 * 2 * 64 + 1, device=DEVICE).half()[1:].view(2, 8, 2, 64)
    for x in (shifted, q.transpose(1, 2).contiguous().transpose(1, 2), packed[:, 1:]):
        copy = triton_gluon.described(x)
        assert copy is not x
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, x)


def test_a_call_that_the_kernel_cannot_take_is_refused_with_a_reason(monkeypatch):
    q = tokens(4, 2)
    assert refusal(q) is None
    assert "float32" in refusal(q.float())
    assert "head_dim of 64 or 128, got 32" in refusal(q[..., :32])
    assert "dropout" in refusal(q, True, None, 0.1, False)
    assert "empty" in refusal(q[:0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "traced graph" in refusal(q)


def test_gluon_that_cannot_be_imported_is_a_reason(monkeypatch):
    def gone() -> None:
        raise ImportError("cannot import name 'warpgroup_mma'")

    monkeypatch.setattr(triton_gluon, "_try", gone)
    assert "its first use failed with ImportError: cannot import name" in refusal(tokens(4, 2))


def test_a_negative_scale_turns_the_scores_over():
    q, k = tokens(70, 2), tokens(70, 1)
    call = partial(attention, k=k, v=k, backend="triton_gluon")
    assert torch.equal(call(q, scale=-SCALE), call(-q, scale=SCALE))
