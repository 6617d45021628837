"""GEMMs of the head on a GPU: aligned whatever the vocabulary, three passes, little memory.

No GPU is needed: the calls are those of the CUDA path, on tensors without numbers.
"""

import pytest
import torch

from emu3_kernels import linear_cross_entropy
from emu3_kernels.ops.loss import chunking, gpu_chunks
from emu3_kernels.runtime import gemm
from tests.loss.fake_gpu import empty, on_fake_gpu, unaligned

V = 184_622
"""Emu3's vocabulary, 2 mod 8."""
MIB = 1 << 20


def train(tokens, *, width=4096, classes=V, kept=None, head=True, **settings):
    """Both passes, and the bytes that they allocate beyond the gradients."""
    with on_fake_gpu() as recorded:
        hidden = empty(tokens, width, requires_grad=True)
        weight = empty(classes, width, requires_grad=head)
        targets = empty(tokens, dtype=torch.int64)
        keep = None if kept is None else empty(kept, dtype=torch.int64)
        before = recorded.live + hidden.nbytes + (weight.nbytes if head else 0)
        linear_cross_entropy(hidden, weight, targets, keep=keep, **settings).sum().backward()
    return recorded, recorded.peak - before


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "classes", "settings"),
    [
        (8192, 4096, V, {}),
        (8192, 4096, V, {"reduction": "none"}),
        (8192, 4096, V, {"memory": 512 * MIB}),
        (32_768, 4096, V, {}),
        (1021, 64, 1000, {"memory": 0}),
        (9, 8, 46, {}),
    ],
)
def test_every_gemm_is_aligned(tokens, width, classes, settings, head):
    call, _ = train(tokens, width=width, classes=classes, head=head, **settings)
    assert call.gemms
    assert not unaligned(call.gemms)


def test_an_unaligned_gemm_is_refused(monkeypatch):
    """Without whole tiles and rows of zeros, all three GEMMs of V = 184,622 are found."""
    for module in (chunking, gpu_chunks):
        monkeypatch.setattr(module, "whole", lambda num_classes: num_classes)
        monkeypatch.setattr(module, "starts_in_dhead", lambda *size: [])
    assert len(unaligned(train(64)[0].gemms)) == 3
    assert len(unaligned(train(64, head=False)[0].gemms)) == 2


def test_8192_tokens_take_three_passes_and_1_5_gib():
    call, extra = train(8192)
    assert call.flops() / (2 * 8192 * 4096 * V) == pytest.approx(3, abs=1e-3)
    assert extra <= 1536 * MIB


def test_4096_tokens_of_an_8b_model_need_no_memory_for_logits():
    """They are stored in dhead, 1.4 GiB of them."""
    call, extra = train(4096)
    assert call.flops() / (2 * 4096 * 4096 * V) == pytest.approx(3, abs=1e-3)
    assert extra <= 128 * MIB


@pytest.mark.parametrize(("tokens", "passes"), [(16_384, 3.14), (65_536, 3)])
def test_many_tokens_hardly_run_a_gemm_twice(tokens, passes):
    call, extra = train(tokens)
    assert call.flops() / (2 * tokens * 4096 * V) == pytest.approx(passes, abs=0.01)
    assert extra <= 4096 * MIB


@pytest.mark.parametrize("memory", [0, 256 * MIB, 1024 * MIB])
@pytest.mark.parametrize("head", [True, False])
def test_memory_is_a_bound(memory, head):
    _, extra = train(8192, memory=memory, head=head)
    per_token = 128 + 4096 * (2 * 2 + 8)
    least = 8192 * (2 * 1024 + per_token) + 8 * MIB if head else 64 * 2 * (V + 64) + 9 * MIB
    assert extra <= max(memory, least)


def test_more_memory_never_costs_more_flops():
    flops = [train(8192, memory=n * 512 * MIB)[0].flops() for n in (0, 1, 2, 4, 8)]
    assert flops == sorted(flops, reverse=True)


def test_sums_over_chunks_are_float32():
    for tokens, memory in ((8192, None), (8192, 0), (65_536, None)):
        call, _ = train(tokens, memory=memory)
        added = [
            out
            for name, (out, _, _) in zip(call.gemm_names, call.gemms, strict=True)
            if name == "addmm"
        ]
        assert added
        assert {out.dtype for out in added} == {torch.float32}


def test_given_tokens_are_known_without_waiting_for_the_gpu():
    assert train(8192)[0].waits == ["nonzero"]
    assert train(8192, kept=2048)[0].waits == []
    assert train(8192, kept=2048, reduction="none")[0].waits == []


def test_without_aligned_parts_the_head_is_refused(monkeypatch):
    monkeypatch.setattr(gemm, "is_ragged", lambda x, weight: False)
    with on_fake_gpu() as recorded:
        gemm.linear(empty(16, 64), empty(V, 64, requires_grad=True)).sum().backward()
    assert len(unaligned(recorded.gemms)) == 2
