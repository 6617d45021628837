"""Gradients of attention in Gluon: emulated on a CPU, with faults of each kind, as the forward."""

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

from emu3_kernels.ops.attention import reference, triton_gluon
from emu3_kernels.ops.attention.key_ranges import document_ranges, one_document
from emu3_kernels.testing.budget import assert_as_accurate
from tests.attention.test_attention_gluon import DEVICE, SCALE, gpu_of_capability, tokens

KERNELS = {name: f"attention_bwd_{name}_gluon_kernel" for name in ("dq", "dkdv")}


@pytest.fixture(autouse=True)
def on_sm_90() -> Iterator[None]:
    with gpu_of_capability(90):
        yield


def check_backward(
    num_queries: int, num_keys: int, starts: tuple = (), *, causal=True, dtype=torch.float16
) -> None:
    """Two sequences of two heads that share keys; ``starts`` are those of documents."""
    q, k, ids = tokens(num_queries, 2, dtype), tokens(num_keys, 1, dtype), None
    v, dout = k.flip(1), q.flip(1)
    dlse = tokens(num_queries, 2)[..., 0].mT.float()
    ranges = one_document(num_queries, num_keys, causal=causal)
    if starts:
        where = torch.arange(num_queries, device=DEVICE)
        ids = torch.searchsorted(torch.tensor(starts, device=DEVICE), where, right=True)
        ids = ids.int().expand(2, -1)
        ranges = document_ranges(ids, causal=causal, with_queries=True)

    def gradients(to: torch.dtype) -> tuple:
        inputs = [x.to(to).requires_grad_() for x in (q, k, v)]
        settings = {"causal": causal, "document_ids": ids, "scale": SCALE, "return_lse": True}
        results = reference.attention(*inputs, **settings)
        douts = dout.to(to), dlse.to(results[1].dtype)
        return results, torch.autograd.grad(results, inputs, douts)

    (out, lse), exact = gradients(torch.float64)
    saved = out.detach().to(dtype), lse.detach().float()
    actual = triton_gluon.backward(dout, q, k, v, *saved, dlse, ranges, SCALE, None)
    for name, *results in zip(("dq", "dk", "dv"), actual, gradients(dtype)[1], exact, strict=True):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "starts", "causal"),
    [
        (300, 700, (), True),
        (150, 90, (), True),
        (130, 300, (), False),
        (400, 400, (1, 130, 140, 390), True),
        (300, 300, (150,), False),
    ],
    ids=[
        "more blocks than stages",
        "queries without keys",
        "not causal",
        "documents",
        "whole documents",
    ],
)
def test_blocks_pass_through_the_stages_in_turn(num_queries, num_keys, starts, causal, dtype):
    check_backward(num_queries, num_keys, starts, causal=causal, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="sm_100 is assumed")
def test_the_gradient_of_sm_100_is_that_of_triton(monkeypatch):
    monkeypatch.setattr(triton_gluon, "whole_backward", lambda *args: args)
    given = *(tokens(1, 1),) * 7, None, SCALE, None
    with gpu_of_capability(100):
        assert triton_gluon.backward(*given) == given


DONE = "        {x} = warpgroup_mma_wait(0, ({x},))\n"
FREED = "        mbarrier.arrive(free.index(stage), count=1)\n"
FAULTS = {
    "freed before they are multiplied": (DONE + FREED, FREED + DONE),
    "no wait": ("        mbarrier.wait(full.index(stage), phase)\n", ""),
    "overtaking": ("mbarrier.wait(free.index(stage), phase ^ 1)\n", "pass\n"),
    "one group frees for both": ("free.index(stage), count=2", "free.index(stage), count=1"),
    "wrong phase": ("nth // STAGES & 1\n        {operands}", "nth & 1\n        {operands}"),
    "scores in flight": ("wait(1, (scores", "wait(2, (scores"),
    "dp in flight": ("wait({running}, (dp", "wait({more}, (dp"),
    "the other group's rows": ("    low += GROUP", "    low += 0 * GROUP"),
    "no mask": ("        if (start < ", "        if False and (start < "),
}
OF_DQ = {
    "delta without dlse": ("delta -= gl", "delta -= 0 * gl"),
    "values that were not waited for": ("2 * k_desc.block_type.nbytes", "k_desc.block_type.nbytes"),
}
OF_DKDV = {
    "no mask at the end": ("start + BLOCK_M > end_whole", "False"),
    "lse of another head": ("(nth_head + i) * num_queries", "nth_head * num_queries"),
    "queries of another head": ("(head + i) * q_head_stride", "head * q_head_stride"),
    "no return to the first query": ("            start = first_query\n", "            pass\n"),
}
PLACES = {
    "dq": {"x": "dq", "operands": "k, v", "running": 0, "more": 1},
    "dkdv": {"x": "dk", "operands": "q, dout", "running": 1, "more": 2},
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a fault may hang a GPU")
@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, x) for name, of in (("dq", OF_DQ), ("dkdv", OF_DKDV)) for x in (FAULTS | of).items()],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_a_fault_in_a_kernel_is_seen(name, fault, tmp_path, monkeypatch):
    module = import_module(f"emu3_kernels.ops.attention.triton_gluon_{name}")
    source = Path(module.__file__).read_text()
    right, wrong = (text.format(**PLACES[name]) for text in fault[1])
    assert source.count(right) == 1
    path = tmp_path / "faulty_kernel.py"
    path.write_text(source.replace(right, wrong))
    spec = spec_from_file_location("faulty_kernel", path)
    faulty = module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setattr(module, KERNELS[name], getattr(faulty, KERNELS[name]))
    with pytest.raises((AssertionError, RuntimeError)):
        check_backward(300, 700)
