"""The memory that linear_cross_entropy allocates beyond its gradients, measured."""

from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from emu3_kernels import linear_cross_entropy
from emu3_kernels.ops.loss import chunking
from emu3_kernels.ops.loss.chunking import (
    BYTES_PER_TOKEN,
    MIN_CLASSES,
    MIN_TOKENS,
    SCRATCH,
    aligned,
)
from emu3_kernels.ops.loss.split_sum import SplitSum
from emu3_kernels.runtime.gemm import mm_
from emu3_kernels.testing.suite import cases
from tests import fresh

MIB = 1 << 20
TOKENS, WIDTH, CLASSES = 900, 64, 5003
CLEAR_REFS = Path("/proc/self/clear_refs")


def caller(dtype, tokens, classes, memory, wants, **settings):
    """A call with its gradients, and the bytes of these."""
    size = {"tokens": tokens, "width": WIDTH, "classes": classes, "dropped": 0.0}
    inputs = cases("linear_cross_entropy").make(**size, dtype=dtype, device="cpu")
    leaves = [inputs[name].requires_grad_() for name in wants]

    def call():
        loss = linear_cross_entropy(**inputs, memory=memory, backend="cpu", **settings)
        return torch.autograd.grad(loss.sum(), leaves) if leaves else loss

    return call, sum(leaf.nbytes for leaf in leaves)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def peak(call):
    """Return the bytes that torch's allocator holds at most during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(num_bytes for _, num_bytes in changes))


def least(dtype, tokens):
    """The documented minimum: the larger of the two smallest chunks, and its temporaries."""
    per_token = BYTES_PER_TOKEN + WIDTH * (2 * dtype.itemsize + 8)
    of_tokens = MIN_TOKENS * aligned(CLASSES) * dtype.itemsize
    of_classes = tokens * MIN_CLASSES * dtype.itemsize
    return max(of_tokens, of_classes) + tokens * per_token + SCRATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 14 * MIB, 40 * MIB])
@pytest.mark.parametrize("wants", [("hidden", "head"), ("hidden",), ("head",), ()])
@pytest.mark.parametrize("settings", [{}, {"reduction": "none", "label_smoothing": 0.1}])
def test_the_allocator_hands_out_no_more_than_the_memory(dtype, memory, wants, settings):
    call, gradients = caller(dtype, TOKENS, CLASSES, memory, wants, **settings)
    assert peak(call) - gradients <= max(memory, least(dtype, TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_it_may_copy_hidden_too(dtype, monkeypatch):
    monkeypatch.setattr(chunking, "MEMORY", 14 * MIB)
    call, _ = caller(dtype, TOKENS, CLASSES, None, ("hidden", "head"))
    copies = TOKENS * WIDTH * (2 * dtype.itemsize + 8)
    told, _ = caller(dtype, TOKENS, CLASSES, 14 * MIB + copies, ("hidden", "head"))
    assert peak(call) == peak(told)


def test_a_split_sum_is_the_float32_sum_rounded_once():
    parts = slice(0, 24), slice(24, 40)
    chunks = [(draw(9, 40, seed=i).t(), draw(9, 24, seed=i + 9)) for i in range(3)]
    expected = torch.zeros(40, 24)
    for (a, b), part in product(chunks, parts):
        mm_(expected[part], a[part], b, add=True)
    for out in (draw(40, 24, seed=0), draw(24, 40, seed=0).t()):
        split_sum = SplitSum(out, 24)
        for (i, (a, b)), part in product(enumerate(chunks), parts):
            split_sum.add_(part, a[part], b, first=i == 0, last=i == 2)
        assert out.equal(expected.bfloat16())


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.e2e), torch.bfloat16]
)
def test_the_process_grows_by_no_more_than_the_memory(dtype):
    """At Emu3's vocabulary; a GEMM that packs its operands shows here alone."""
    memory = 96 * MIB
    done = fresh.run(f"from {__name__} import *; print(growth({dtype}, {memory}))")
    assert int(done.stdout) <= memory, done.stderr


def growth(dtype, memory):
    """Return by how many bytes beyond its gradients a warm call raises the peak of a process."""
    call, gradients = caller(dtype, 384, 184_622, memory, ("hidden", "head"))
    call()
    CLEAR_REFS.write_text("5")  # the peak begins anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before - gradients


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
