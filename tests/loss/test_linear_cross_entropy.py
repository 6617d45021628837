"""What is special about linear_cross_entropy: dropped tokens, chunks, saved gradients."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import cross_entropy, linear_cross_entropy
from emu3_kernels.ops.loss import cpu_chunks
from emu3_kernels.ops.loss.chunking import MEMORY, MIN_CLASSES, MIN_TOKENS
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import (
    at_level,
    backends,
    cases,
    double,
    runnable,
    value_and_gradients,
)
from emu3_kernels.testing.suite import reference as reference_of

FUSED = list(backends("linear_cross_entropy"))
REFERENCE = reference_of("linear_cross_entropy")
SEVERAL_CHUNKS = {
    "tokens": MIN_TOKENS * 8 // 5,  # of which two thirds are valid
    "width": 24,
    "classes": 2 * MIN_CLASSES + 37,
    "weighted": True,
}
"""Of tokens, without memory; in bfloat16 with a gradient for the head, of classes."""


def run(backend, inputs, **settings):
    name, level = at_level(backend)
    with level:
        call = partial(linear_cross_entropy, backend=name, **settings)
        return value_and_gradients("linear_cross_entropy", call, inputs)


def make(dtype=torch.float32, **size):
    return cases("linear_cross_entropy").make(**size, dtype=dtype, device="cpu")


def assert_same(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 1e-3}]
)
def test_several_chunks_are_as_accurate_as_one(backend, dtype, settings):
    inputs = make(runnable(backend, dtype), **SEVERAL_CHUNKS, **settings)
    actual = run(backend, inputs, memory=0)
    low = value_and_gradients("linear_cross_entropy", REFERENCE, inputs)
    exact = value_and_gradients("linear_cross_entropy", REFERENCE, double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", [0, MEMORY])
def test_dropping_tokens_is_exact(backend, memory):
    """Valid tokens alone give the same bits, whatever the hidden states of the others.

    Only the sum over tokens may have another order.
    """
    inputs = make(**SEVERAL_CHUNKS, reduction="sum")
    kept = (inputs["targets"] != -100) & (inputs["weights"] != 0)
    alone = inputs | {name: inputs[name][kept] for name in ("hidden", "targets", "weights")}
    inputs["hidden"][~kept] = float("nan")
    actual, expected = (run(backend, x, memory=memory) for x in (inputs, alone))
    assert not actual["dhidden"][~kept].any()
    actual["dhidden"] = actual["dhidden"][kept]
    torch.testing.assert_close(actual.pop("output 0"), expected.pop("output 0"))
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_no_token_at_all_costs_nothing(backend):
    inputs = make(tokens=3, width=8, classes=33)
    inputs["targets"][:] = -100
    for value in run(backend, inputs).values():
        assert not value.any()


@pytest.mark.parametrize("backend", FUSED)
def test_it_is_cross_entropy_of_the_logits(backend):
    inputs = make(**SEVERAL_CHUNKS, z_loss=0.1, reduction="none")
    hidden, head, *_ = inputs.values()
    rest = {name: value for name, value in inputs.items() if name not in ("hidden", "head")}
    expected = cross_entropy(F.linear(hidden, head), **rest)
    torch.testing.assert_close(run(backend, inputs)["output 0"], expected)


@pytest.mark.parametrize("backend", FUSED)
def test_the_saved_gradient_is_scaled_in_every_backward_pass(backend):
    inputs = make(tokens=5, width=24, classes=33)
    name, level = at_level(backend)
    hidden = inputs.pop("hidden").requires_grad_()
    with level:
        loss = linear_cross_entropy(hidden, **inputs, backend=name)
        (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (thrice,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(thrice, 3 * once)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_losses_of_tokens_come_beside_the_loss_and_change_nothing(backend, with_gradients):
    """A token's, before its weight, and 0 at weight 0; the gradient is that of the loss alone."""
    given = make(tokens=70, width=24, classes=90, weighted=True)
    hidden = given["hidden"].requires_grad_(with_gradients)
    name, level = at_level(backend) if backend != "reference" else (backend, nullcontext())
    others = given["head"], given["targets"]
    settings = {"weights": given["weights"], "normalizer": 3.0, "backend": name}
    with level:
        loss, losses = linear_cross_entropy(hidden, *others, return_losses=True, **settings)
        alone = linear_cross_entropy(hidden, *others, **settings)
    each = F.cross_entropy(hidden.double() @ others[0].double().T, others[1], reduction="none")
    expected = torch.where(given["weights"] != 0, each, 0)
    assert not losses.requires_grad
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(loss, alone)
    if with_gradients:
        (found,), (same,) = (torch.autograd.grad(x, hidden) for x in (loss, alone))
        assert torch.equal(found, same)


@pytest.mark.parametrize("backend", FUSED)
def test_without_gradients_the_value_is_the_same(backend):
    inputs = make(**SEVERAL_CHUNKS)
    name, level = at_level(backend)
    with level:
        loss = linear_cross_entropy(**inputs, backend=name)
    torch.testing.assert_close(loss, run(backend, inputs)["output 0"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_two_runs_and_two_thread_counts_give_the_same_bits(backend):
    inputs = make(runnable(backend, torch.bfloat16), **SEVERAL_CHUNKS)
    threads = torch.get_num_threads()
    first = run(backend, inputs)
    torch.set_num_threads(1)
    try:
        assert_same(run(backend, inputs), first)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def gemms(monkeypatch):
    """M * N * K of every GEMM; a dispatch mode does not see inside a custom op."""
    counts = []

    def counted(function, *args, **kwargs):
        left, right = args[-2:]
        counts.append(left.shape[0] * left.shape[1] * right.shape[1])
        return function(*args, **kwargs)

    monkeypatch.setattr(cpu_chunks, "mm_", partial(counted, cpu_chunks.mm_))
    return counts


@pytest.mark.parametrize(
    ("dtype", "memory", "hidden", "head", "expected"),
    [
        (torch.float32, MEMORY, True, True, 3),
        (torch.float32, MEMORY, True, False, 2),
        (torch.float32, MEMORY, False, True, 2),
        (torch.float32, MEMORY, False, False, 1),
        (torch.float32, 0, True, True, 3),
        (torch.bfloat16, 0, True, False, 2),
        (torch.bfloat16, 0, False, False, 1),
        (torch.bfloat16, 0, True, True, 3 + 2 / 3),  # three chunks, the last is still there
        (torch.bfloat16, 0, False, True, 2 + 2 / 3),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gemm_runs_for_a_gradient_that_is_not_needed(
    dtype, memory, hidden, head, expected, reduction, gemms
):
    """A frozen head saves the GEMM of dhead, a frozen trunk that of dhidden."""
    size = {"tokens": 3 * MIN_TOKENS, "width": 8, "classes": 3 * MIN_CLASSES, "dropped": 0.0}
    inputs = make(dtype, **size)
    inputs["hidden"].requires_grad_(hidden)
    inputs["head"].requires_grad_(head)
    loss = linear_cross_entropy(**inputs, memory=memory, reduction=reduction)
    if hidden or head:
        loss.sum().backward()
    one = size["tokens"] * size["width"] * size["classes"]
    again = reduction == "none" and (hidden or head)  # the forward pass saves nothing then
    assert sum(gemms) == pytest.approx((expected + again) * one)


def test_only_the_chunks_that_do_not_fit_are_computed_again(gemms):
    """The chunk that is kept for the backward pass is whole; the first takes the remainder."""
    size = {"tokens": 3 * MIN_TOKENS, "width": 8, "classes": 2 * MIN_CLASSES + 37, "dropped": 0.0}
    inputs = make(torch.bfloat16, **size)
    inputs["hidden"].requires_grad_()
    inputs["head"].requires_grad_()
    linear_cross_entropy(**inputs, memory=0).backward()
    multiplied = 3 * size["classes"] + size["classes"] - MIN_CLASSES
    assert sum(gemms) == multiplied * size["tokens"] * size["width"]


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("name", ["hidden", "head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone_is_as_accurate_as_both(backend, name, reduction):
    inputs = make(runnable(backend, torch.bfloat16), **SEVERAL_CHUNKS, reduction=reduction)
    oracle = partial(value_and_gradients, "linear_cross_entropy", REFERENCE)
    low, exact = oracle(inputs), oracle(double(inputs))
    chosen, level = at_level(backend)
    leaf = inputs[name].detach().requires_grad_()
    with level:
        loss = linear_cross_entropy(**inputs | {name: leaf}, backend=chosen, memory=0)
        dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        (gradient,) = torch.autograd.grad(loss, leaf, dloss.to(loss))
    assert_as_accurate(name, gradient, low[f"d{name}"], exact[f"d{name}"])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_one_graph_serves_every_number_of_valid_tokens(backend):
    torch.compiler.reset()
    call = partial(linear_cross_entropy, backend=at_level(backend)[0])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = make(tokens=8, width=24, classes=33)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for dropped in (0, 3, 8):
            weights = (torch.arange(8) >= dropped).float()
            case = inputs | {"weights": weights}
            actual, expected = (
                value_and_gradients("linear_cross_entropy", function, case)
                for function in (compiled, call)
            )
            assert_same(actual, expected)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_bad_arguments_are_named(backend):
    hidden, head, targets = torch.randn(5, 8), torch.randn(9, 8), torch.arange(5)
    call = partial(linear_cross_entropy, backend=at_level(backend)[0])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: hidden must be \[..., D\]"):
        call(hidden, head[:, :7], targets)
    with pytest.raises(ValueError, match=r"hidden must be .* same dtype"):
        call(hidden, head.double(), targets)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 9\) .*got 9"):
        call(hidden, head, targets + 5)
    with pytest.raises(ValueError, match="reduction must be one of"):
        call(hidden, head, targets, reduction="max")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_is_no_number_does_not_reach_ignored_tokens(reduction):
    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8)
    loss = linear_cross_entropy(hidden, head, torch.tensor([1, -100, 2]), reduction=reduction)
    (loss.sum() * float("nan")).backward()
    assert hidden.grad.isnan().all(1).tolist() == [True, False, True]
    assert not hidden.grad[1].any()


def test_a_head_without_channels_gives_all_classes_the_same_logit():
    loss = linear_cross_entropy(
        torch.zeros(2, 3, 0), torch.zeros(7, 0), torch.zeros(2, 3, dtype=torch.int64)
    )
    torch.testing.assert_close(loss, torch.tensor(7.0).log())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_autocast_casts_hidden_and_head_alone(backend, reduction):
    """A float32 head raised under a decoder whose output autocast had cast."""
    name, level = at_level(backend)
    narrow = runnable(backend, torch.bfloat16)
    inputs = make(tokens=70, width=16, classes=1100)
    hidden, head = (inputs.pop(n).requires_grad_() for n in ("hidden", "head"))
    call = partial(linear_cross_entropy, **inputs, reduction=reduction, backend=name)
    with level:
        expected = call(hidden.to(narrow), head.to(narrow)).sum()
        expected = expected, *torch.autograd.grad(expected, (hidden, head))
        with torch.autocast("cpu", narrow):
            loss = call(hidden.to(narrow), head).sum()
            assert loss.equal(call(hidden, head).sum())
            actual = loss, *torch.autograd.grad(loss, (hidden, head))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.equal(theirs)
