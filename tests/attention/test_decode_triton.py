"""decode_attention in Triton: one launch, whose last program merges, and what a call costs."""

import os
import re
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_kernels import decode_attention
from emu3_kernels.runtime import counters as counting
from emu3_kernels.runtime.contracts import meta
from emu3_kernels.runtime.counters import counters
from emu3_kernels.runtime.launch import Gpu, assume_gpu
from emu3_kernels.testing.suite import cases

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to run", allow_module_level=True)

import triton

from emu3_kernels.ops.attention import triton_decode
from emu3_kernels.testing import codegen
from emu3_kernels.testing.launches import recorded_launches
from tests.gates import tracing

CASES = cases("decode_attention")


class Ops(TorchDispatchMode):
    """Names every op of PyTorch inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


def ops_and_launches():
    inputs = CASES.make(**CASES.check[-1], dtype=torch.bfloat16, device="cpu")
    with recorded_launches() as launches:
        decode_attention(**inputs, backend="triton")
        del launches[:]
        checked = mock.patch("emu3_kernels.ops.attention.api._check_values")  # of a CPU alone
        with checked, Ops() as ops:
            decode_attention(**inputs, backend="triton")
    return ops.names, launches


def test_a_call_is_one_launch_and_two_allocations(compiling):
    """Lengths, pages and words are checked once, by whoever makes them, and not in every layer."""
    ops, launches = compiling(ops_and_launches)
    assert launches == ["decode_attention_kernel"]
    assert ops == ["aten::new_empty", "aten::new_empty"]


@pytest.mark.parametrize("size", [CASES.check[2], CASES.check[-1]])
def test_a_graph_of_it_is_one_launch(size, compiling):
    launched, graph, _ = compiling(tracing.traced, "decode_attention", size, torch.bfloat16, False)
    assert launched == ["decode_attention_kernel"]
    assert "triton_kernel_wrapper" in graph


def ptx_of(num_new):
    q, cache, lengths = meta(2, num_new, 32, 128), meta(2, 8192, 8, 128), meta(2, dtype=torch.int32)
    with codegen.recorded() as launches:
        triton_decode.forward(q, cache, cache, lengths, mask=None, scale=1.0, page_table=None)
    binaries, compile = [], triton.compile

    def kept(*args, **options):
        binaries.append(compile(*args, **options))
        return binaries[-1]

    anew = mock.patch.object(codegen, "cached_all", lambda keys, make: make([*range(len(keys))]))
    with anew, mock.patch.object(triton, "compile", kept):
        codegen.facts_of(launches[:1], "sm_90")
    return binaries[0].asm["ptx"]


@pytest.mark.parametrize("num_new", [1, 64])
def test_partial_results_are_stored_before_the_count_and_read_after_it(num_new, compiling):
    """By every thread: a barrier, which orders the threads of a program, is on either side."""
    ptx = compiling(ptx_of, num_new)
    wanted = r"st\.global|bar\.sync|atom\.\S+|ld\.global\.cg"
    found = re.findall(wanted, ptx)
    count = next(i for i, op in enumerate(found) if op.startswith("atom.global.gpu.acq_rel.add"))
    before, after = found[:count], found[count + 1 :]
    assert before[-1] == "bar.sync"
    assert "st.global" in before
    assert not any(op.startswith("ld.global.cg") for op in before)
    assert "bar.sync" in after[: after.index("ld.global.cg")]


def grids():
    grids = []
    for batch, capacity, num_new in [(1, 131_072, 1), (2, 8192, 1), (16, 4096, 1), (2, 4096, 64)]:
        cache, lengths = meta(batch, capacity, 8, 128), meta(batch, dtype=torch.int32)
        with assume_gpu(Gpu(warp_size=32, num_sms=132)), codegen.recorded() as launches:
            q = meta(batch, num_new, 32, 128)
            triton_decode.forward(q, cache, cache, lengths, mask=None, scale=1.0, page_table=None)
        splits, rows, num_warps = (
            launches[0].options[name] for name in ("BLOCK_S", "BLOCK_M", "num_warps")
        )
        grids.append((batch * 8 * (num_new * 4 // rows or 1) * splits, num_warps))
    return grids


def test_programs_of_emu3_fill_an_h200_once(compiling):
    """Two of four warps on each of its 132 multiprocessors, or one of eight."""
    assert compiling(grids) == [(256, 4), (256, 4), (256, 4), (128, 8)]


def test_counters_are_zero_after_every_call():
    for size in CASES.check[1:]:
        inputs = CASES.make(**size, dtype=torch.float32, device="cpu")
        for _ in range(2):
            first = decode_attention(**inputs, backend="triton")
            assert not counters(inputs["q"], 1).any()
        assert torch.equal(first, decode_attention(**inputs, backend="triton"))


@pytest.fixture
def streams(monkeypatch):
    """A GPU in the mind of ``counters``: set its stream, and whether it is being captured."""
    stream = {"handle": 7, "capturing": False}
    monkeypatch.setattr(counting, "_of_stream", {})
    monkeypatch.setattr(counting, "_captured", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    capturing = "is_current_stream_capturing"
    monkeypatch.setattr(torch.cuda, capturing, lambda: stream["capturing"])
    current = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, current, lambda _: stream["handle"], raising=False)
    return stream


def test_launches_share_counters_on_a_stream_alone(streams):
    x = torch.empty(0)
    held = counters(x, 16)
    assert counters(x, 8) is held
    assert len(counters(x, 5000)) >= 5000
    streams["handle"] = 8
    assert counters(x, 16) is not held


def test_a_captured_launch_has_counters_of_its_own(streams):
    x = torch.empty(0)
    counters(x, 16)
    streams["capturing"] = True
    captured = [counters(x, 16) for _ in range(3)]
    ends = [each.data_ptr() + 64 for each in captured]
    assert [each.data_ptr() for each in captured[1:]] == ends[:2]
    assert counters(x, counting.NUM_CAPTURED).data_ptr() != ends[2]
    assert not any(each.any() for each in captured)


def test_a_launch_captured_before_any_other_has_counters_zeroed_in_its_graph(streams):
    streams["capturing"] = True
    x = torch.empty(0)
    with Ops() as ops:
        counters(x, 16)
    assert ops.names == ["aten::new_zeros"]
