"""The order of chunks on a GPU, interpreted: logits in dhead, in a buffer, computed twice."""

from functools import partial

import pytest
import torch

from emu3_kernels import linear_cross_entropy
from emu3_kernels.ops.loss import chunking, gpu_chunks
from emu3_kernels.runtime.launch import INTERPRETED
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference, value_and_gradients

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on a CPU interpreted alone")
REFERENCE = reference("linear_cross_entropy")
FUSED = partial(linear_cross_entropy, backend="triton")
WIDTH, CLASSES = 32, 5 * 128 + 46


@pytest.fixture
def small(monkeypatch):
    """Chunks and blocks so small that a call of a few tokens has several of them."""
    for module in (chunking, gpu_chunks):
        monkeypatch.setattr(module, "CLASSES_IN_DHEAD", 128)
        monkeypatch.setattr(module, "TOKENS_OF_DHIDDEN", 10)
    monkeypatch.setattr(chunking, "MIN_CLASSES", 128)
    monkeypatch.setattr(chunking, "MIN_TOKENS_OF_SUM", 1)
    monkeypatch.setattr(chunking, "SCRATCH", 0)


def make(tokens, dtype=torch.float32, **settings):
    size = {"tokens": tokens, "width": WIDTH, "classes": CLASSES, "weighted": True}
    make = cases("linear_cross_entropy").make
    return make(**size, **settings, dtype=dtype, device="cpu")


def plan(tokens, memory, dtype=torch.float32):
    kind = (WIDTH, dtype, memory)
    in_dhead = len(chunking.starts_in_dhead(tokens, CLASSES, WIDTH))
    return in_dhead, chunking.gpu_chunking(tokens, CLASSES, *kind, wants_head=True)


def assert_accurate(inputs, **settings):
    actual = value_and_gradients("linear_cross_entropy", partial(FUSED, **settings), inputs)
    low = value_and_gradients("linear_cross_entropy", REFERENCE, inputs)
    exact = value_and_gradients("linear_cross_entropy", REFERENCE, double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize(
    ("tokens", "in_dhead", "dtype", "settings"),
    [  # two thirds of the tokens are valid
        (15, 4, torch.float32, {}),
        (15, 4, torch.float16, {"z_loss": 1e-3}),
        (50, 3, torch.float32, {"reduction": "none"}),
        (75, 2, torch.float32, {}),
        (195, 0, torch.float32, {}),
    ],
)
def test_logits_in_dhead_are_not_overwritten(tokens, in_dhead, dtype, settings, small):
    """With fewer tokens than D, somewhat more, twice as many, and too many to store any."""
    assert plan(tokens * 2 // 3, 1 << 30)[0] == in_dhead
    assert_accurate(make(tokens, dtype, **settings), memory=1 << 30)


def test_logits_that_do_not_fit_are_computed_again(small):
    in_dhead, chosen = plan(40, 0)
    assert in_dhead == 3
    assert (chosen.classes, chosen.sums_dhead) == (128, False)  # of 256 beside dhead
    assert_accurate(make(60, label_smoothing=0.1), memory=0)


def test_chunks_of_tokens_add_to_a_float32_dhead(small):
    memory = 199 << 10
    chosen = plan(100, memory)[1]
    assert (chosen.tokens, chosen.sums_dhead) == (64, True)
    assert_accurate(make(150), memory=memory)


@pytest.mark.parametrize(("memory", "reduction"), [(0, "mean"), (1 << 30, "none")])
def test_given_tokens_give_the_same_bits(memory, reduction, small):
    """Some that are given are ignored, and their hidden states are no numbers."""
    inputs = make(12, reduction=reduction)
    valid = (inputs["targets"] != -100) & (inputs["weights"] != 0)
    expected = value_and_gradients("linear_cross_entropy", partial(FUSED, memory=memory), inputs)
    inputs["hidden"][~valid] = float("nan")
    ignored = (~valid).nonzero().squeeze(1)
    for extra in (ignored[:0], ignored):
        keep = torch.cat([valid.nonzero().squeeze(1), extra]).sort().values
        call = partial(FUSED, memory=memory, keep=keep)
        actual = value_and_gradients("linear_cross_entropy", call, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7)
        assert not actual["dhidden"][~valid].any()


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_keep_must_hold_every_valid_token_once(backend):
    inputs = make(6)
    call = partial(linear_cross_entropy, **inputs, backend=backend)
    for keep in ([0, 2], [0, 0, 2, 3], [0, 2, 3, 3]):
        with pytest.raises(ValueError, match="keep must hold every valid token once, got"):
            call(keep=torch.tensor(keep))
    with pytest.raises(ValueError, match=r"keep must be \[N\] int64 on cpu, got"):
        call(keep=torch.tensor([0, 2, 3], dtype=torch.int32))
