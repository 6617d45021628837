"""What is special about linear_cross_entropy: dropped tokens, blocks, memory, kept gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import cross_entropy, linear_cross_entropy
from emu3_kernels.ops.linear_cross_entropy import cases, reference
from emu3_kernels.ops.linear_cross_entropy.api import MEMORY
from emu3_kernels.ops.linear_cross_entropy.blocks import MIN_BLOCK, block_size
from tests.budget import assert_as_accurate
from tests.kernels.suite import at_level, backends, double, runnable, value_and_gradients

FUSED = list(backends("linear_cross_entropy"))
SEVERAL_BLOCKS = {"tokens": 7, "width": 24, "classes": 2 * MIN_BLOCK + 37, "weighted": True}


def run(backend, inputs, **settings):
    name, level = at_level(backend)
    with level:
        call = partial(linear_cross_entropy, backend=name, **settings)
        return value_and_gradients("linear_cross_entropy", call, inputs)


def make(dtype=torch.float32, **size):
    return cases.make(**size, dtype=dtype, device="cpu")


def assert_same(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 1e-3}]
)
def test_several_blocks_are_as_accurate_as_none(backend, dtype, settings):
    inputs = make(runnable(backend, dtype), **SEVERAL_BLOCKS, **settings)
    actual = run(backend, inputs, memory=0)
    low = value_and_gradients("linear_cross_entropy", reference.linear_cross_entropy, inputs)
    exact = value_and_gradients(
        "linear_cross_entropy", reference.linear_cross_entropy, double(inputs)
    )
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", [0, MEMORY])
def test_dropping_tokens_is_exact(backend, memory):
    """The tokens that count give the bits that they give alone, whatever the others hold.

    Only the sum over tokens may add in another order.
    """
    inputs = make(**SEVERAL_BLOCKS, reduction="sum")
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
    inputs = make(**SEVERAL_BLOCKS, z_loss=0.1, reduction="none")
    hidden, head, *_ = inputs.values()
    rest = {name: value for name, value in inputs.items() if name not in ("hidden", "head")}
    expected = cross_entropy(F.linear(hidden, head), **rest)
    torch.testing.assert_close(run(backend, inputs)["output 0"], expected)


@pytest.mark.parametrize("backend", FUSED)
def test_the_kept_gradient_is_scaled_as_often_as_it_is_asked_for(backend):
    inputs = make(tokens=5, width=24, classes=33)
    name, level = at_level(backend)
    hidden = inputs.pop("hidden").requires_grad_()
    with level:
        loss = linear_cross_entropy(hidden, **inputs, backend=name)
        (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (thrice,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(thrice, 3 * once)


@pytest.mark.parametrize("backend", FUSED)
def test_without_gradients_the_value_is_the_same(backend):
    inputs = make(**SEVERAL_BLOCKS)
    name, level = at_level(backend)
    with level:
        loss = linear_cross_entropy(**inputs, backend=name)
    torch.testing.assert_close(loss, run(backend, inputs)["output 0"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_two_runs_and_two_thread_counts_give_the_same_bits(backend):
    inputs = make(runnable(backend, torch.bfloat16), **SEVERAL_BLOCKS)
    threads = torch.get_num_threads()
    first = run(backend, inputs)
    torch.set_num_threads(1)
    try:
        assert_same(run(backend, inputs), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("num_tokens", [0, 1, 512, 2048, 10_240, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buffer_keeps_within_the_memory(num_tokens, dtype):
    """At Emu3's vocabulary, whatever the number of tokens; hidden 512 wide."""
    head = torch.empty(184_622, 512, dtype=dtype, device="meta")
    block = block_size(head.new_empty(num_tokens, 512), head, MEMORY)
    buffer = num_tokens * block * dtype.itemsize
    dhidden = num_tokens * 512 * (4 if dtype == torch.float32 else 2 + 4)
    assert block % 64 == 0
    assert block >= MIN_BLOCK
    assert buffer + dhidden <= MEMORY


def test_one_graph_serves_every_number_of_tokens_that_count():
    torch.compiler.reset()
    call = partial(linear_cross_entropy, backend="native")
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
