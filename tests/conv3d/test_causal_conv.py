"""What is special about the causal convolutions: streaming, pads, the block in one pass, errors."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emu3_kernels
from emu3_kernels import FrameCache, causal_conv3d, temporal_residual
from emu3_kernels.ops.conv3d import block
from emu3_kernels.runtime import dispatch, library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import (
    at_level,
    backends,
    cases,
    double,
    reference,
    runnable,
    value_and_gradients,
)

BACKENDS = list(backends("causal_conv3d"))
EMU3_KERNELS = [((3, 3, 3), (1, 1, 1)), ((4, 3, 3), (2, 1, 1)), ((3, 1, 1), (1, 1, 1))]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_inputs(shape: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    return cases("temporal_residual").make(shape=shape, dtype=dtype, device="cpu")


def stream(x: Tensor, cuts: list[int], weight: Tensor, bias: Tensor | None, **how) -> Tensor:
    """Convolve the pieces of ``x`` between ``cuts``; a residual is cut as the results are."""
    residual = how.pop("residual", None)
    stride = how.get("stride", (1, 1, 1))[0]
    cache, pieces, front = FrameCache(), [], weight.shape[2] - stride
    for start, end in pairwise([0, *cuts, x.shape[2]]):
        done, until = (max(0, (t + front - weight.shape[2]) // stride + 1) for t in (start, end))
        rest = None if residual is None else residual[:, :, done:until]
        y, cache = causal_conv3d(
            x[:, :, start:end], weight, bias, residual=rest, cache=cache, **how
        )
        assert y.shape[2] == until - done
        pieces.append(y)
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_video_in_pieces_is_the_video_at_once_bit_for_bit(backend, dtype, data):
    name, level = at_level(backend)
    dtype = runnable(backend, dtype)
    stride = data.draw(st.integers(1, 3), "stride")
    kernel = data.draw(st.integers(stride, 5), "kernel")
    frames = data.draw(st.integers(0, 9), "frames")
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=5), "cuts"))
    x, weight = draw(1, 3, frames, 4, 19, dtype=dtype), draw(2, 3, kernel, 3, 3, dtype=dtype)
    how = {
        "stride": (stride, 1, 1),
        "scale": draw(3, seed=1, dtype=dtype),
        "shift": draw(3, seed=2, dtype=dtype),
        "activation": "silu",
        "residual": draw(1, 2, frames // stride, 4, 19, seed=3, dtype=dtype),
        "backend": name,
    }
    with level:
        at_once = causal_conv3d(x, weight, None, **how)
        in_pieces = stream(x, cuts, weight, None, **how)
    assert torch.equal(in_pieces, at_once)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [[2, 3, 5, 37, 21], [1, 4, 8, 9, 21], [1, 16, 3, 130, 18]])
@pytest.mark.usefixtures("four_threads")
def test_the_block_is_two_convolutions_bit_for_bit(backend, dtype, shape):
    """At once and, since it is how the two stream, in pieces.

    The generic suite needs gradients, which take two passes: this tests the one pass. Four
    threads split its shapes into tiles of frames and of rows, which recompute their borders.
    Triton's, which is two launches, has a test in bfloat16.
    """
    name, level = at_level(backend)
    i = block_inputs(shape, dtype)
    first = {"scale": i["scale1"], "shift": i["shift1"], "activation": "silu", "backend": name}
    second = {"scale": i["scale2"], "shift": i["shift2"], "activation": "silu", "backend": name}
    with level:
        hidden = stream(i["x"], [1, 1, 2], i["weight1"], i["bias1"], **first)
        y = stream(hidden, [2, 3], i["weight2"], i["bias2"], residual=i["x"], **second)
        assert torch.equal(temporal_residual(**i, backend=name), y)


@pytest.mark.parametrize("op", ["causal_conv3d", "temporal_residual"])
def test_the_number_of_threads_changes_no_bit(op):
    """Sums over tiles too: their number is that of the shape."""
    inputs = block_inputs([2, 5, 6, 70, 33], torch.float32)
    if op == "causal_conv3d":
        inputs = {name: inputs[f"{name}1"] for name in ("weight", "bias", "scale", "shift")} | {
            "x": inputs["x"], "stride": (2, 2, 1), "activation": "silu", "post_activation": "silu",
        }  # fmt: skip
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(op, getattr(emu3_kernels, op), inputs))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert all(torch.equal(other[name], value) for other in results[1:]), name


def gradients(op: str, inputs: dict, wrt: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients of the inputs ``wrt``; the others require none."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt}
    y = getattr(emu3_kernels, op)(**inputs | leaves)
    dy = draw(*y.shape, seed=7, dtype=y.dtype)
    return dict(zip(wrt, torch.autograd.grad(y, tuple(leaves.values()), dy), strict=True))


def recorded(function: Callable) -> tuple[Callable, list]:
    """Return ``function`` and a list that gets what it returns."""
    results = []

    def record(*args):
        results.append(function(*args))
        return results[-1]

    return record, results


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "wrt",
    [("x",), ("scale",), ("shift",), ("weight",), ("bias",), ("residual",), ("x", "weight")],
)
def test_only_the_gradients_that_are_needed_are_computed(backend, wrt, monkeypatch):
    """Gradients of norms come with dx, of biases with dweight: sums over the same elements."""
    inputs = {"x": draw(1, 3, 3, 4, 5), "weight": draw(2, 3, 3, 3, 3, seed=1), "bias": draw(2)}
    inputs |= {"scale": draw(3, seed=2), "shift": draw(3, seed=3), "residual": draw(1, 2, 3, 4, 5)}
    how = {"activation": "silu", "post_activation": "silu", "backend": backend}
    every = gradients("causal_conv3d", inputs | how, tuple(inputs))
    present = dispatch.backends("causal_conv3d")
    backward, results = recorded(present[backend].backward)
    monkeypatch.setitem(present, backend, replace(present[backend], backward=backward))
    for name, gradient in gradients("causal_conv3d", inputs | how, wrt).items():
        assert torch.equal(gradient, every[name])
    [(dx, dweight, dbias, dscale, dshift)] = results
    for together, names in (
        ((dx, dscale, dshift), {"x", "scale", "shift"}),
        ((dweight, dbias), {"weight", "bias"}),
    ):
        assert all((gradient is not None) == bool(names & set(wrt)) for gradient in together)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("wrt", "passes"),
    [
        (("weight2",), [(False, True)]),
        (("bias2",), [(False, True)]),
        (("scale2",), [(True, False)]),
        (("shift2", "weight2"), [(True, True)]),
        (("weight1",), [(True, False), (False, True)]),
        (("bias1", "bias2"), [(True, True), (False, True)]),
        (("scale1",), [(True, False), (True, False)]),
        (("shift1",), [(True, False), (True, False)]),
        (("x",), [(True, False), (True, False)]),
    ],
)
def test_a_block_computes_only_the_passes_that_are_needed(backend, wrt, passes, monkeypatch):
    """Of the second convolution, and then of the first: the input's gradient, the weight's."""
    inputs = block_inputs([1, 3, 3, 4, 5], torch.float32)
    every = gradients("temporal_residual", inputs | {"backend": backend}, tuple(inputs))
    results = []
    backward = block.backward

    def of_block(convolve_backward, *args):
        recording, made = recorded(convolve_backward)
        grads = backward(recording, *args)
        results.extend(made)
        return grads

    monkeypatch.setattr(block, "backward", of_block)
    of_call = gradients("temporal_residual", inputs | {"backend": backend}, wrt)
    for name, gradient in of_call.items():
        assert torch.equal(gradient, every[name])
    made = [(dx is not None, dweight is not None) for dx, dweight, *_ in results]
    assert made == passes


@pytest.mark.parametrize(("kernel", "stride"), EMU3_KERNELS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_pads_are_those_of_emu3(backend, kernel, stride):
    """Two zero frames ahead, always, and (p//2 + p%2, p//2) in space, after norm and activation.

    Small integers and no SiLU: every sum is exact, whatever its order.
    """
    name, level = at_level(backend)
    x = draw(1, 4, 6, 5, 7).mul(4).round()
    weight, shift = draw(4, 4, *kernel, seed=1).mul(2).round(), torch.full((4,), 3.0)
    with level:
        y = causal_conv3d(
            x, weight, None, stride=stride, scale=torch.ones(4), shift=shift, backend=name
        )
    space = [n for k, s in zip(kernel[:0:-1], stride[:0:-1], strict=True)
             for n in ((k - s) // 2 + (k - s) % 2, (k - s) // 2)]  # fmt: skip
    assert torch.equal(y, F.conv3d(F.pad(x + 3, (*space, 2, 0)), weight, stride=stride))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_residual_comes_after_the_last_activation(backend):
    name, level = at_level(backend)
    x = torch.full((1, 1, 1, 1, 1), 50.0)
    how = {"post_activation": "silu", "backend": name}
    with level:
        y = causal_conv3d(x, -torch.ones(1, 1, 1, 1, 1), None, residual=-x, **how)
    assert y.item() == -50


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_output_depends_on_no_later_frame(backend):
    name, level = at_level(backend)
    x, weight = draw(1, 4, 8, 5, 6), draw(4, 4, 4, 3, 3, seed=1)
    changed = x.clone()
    changed[:, :, 4:] = torch.nan
    with level:
        y, z = (
            causal_conv3d(v, weight, None, stride=(2, 1, 1), backend=name) for v in (x, changed)
        )
    # Result t ends with frame 2 * t + 1.
    assert torch.equal(y[:, :, :2], z[:, :, :2])
    assert z[:, :, 2:].isnan().all()


def test_a_call_leaves_its_cache_and_keeps_no_view_of_its_piece():
    x, weight = draw(1, 4, 5, 3, 4), draw(4, 4, 3, 3, 3, seed=1)
    piece = x[:, :, :3].clone()
    _, cache = causal_conv3d(piece, weight, None, cache=FrameCache())
    kept = cache.frames.clone()
    expected, _ = causal_conv3d(x[:, :, 3:], weight, None, cache=cache)
    piece.zero_()
    again, _ = causal_conv3d(x[:, :, 3:], weight, None, cache=cache)
    assert torch.equal(cache.frames, kept)
    assert torch.equal(again, expected)


def test_norms_may_be_wider_than_the_video():
    """Running statistics stay in float32 beside a model in bfloat16."""
    x, weight = draw(1, 4, 3, 5, 20, dtype=torch.bfloat16), draw(4, 4, 3, 3, 3, seed=1)
    norm = {"scale": draw(4, seed=2), "shift": draw(4, seed=3)}
    inputs = {"x": x, "weight": weight.bfloat16(), "bias": None} | norm
    grads = value_and_gradients("causal_conv3d", causal_conv3d, inputs)
    assert grads["dscale"].dtype == torch.float32
    assert grads["dweight"].dtype == grads["output 0"].dtype == torch.bfloat16


def test_float32_weights_of_a_bfloat16_video_round_nothing():
    """Neither the weights nor, for their gradient, the normed video."""
    x, bias = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16), torch.full((1,), -1.0)
    weight = torch.full((1, 1, 1, 1, 1), 1 + 2**-12, requires_grad=True)
    assert causal_conv3d(x, weight, bias, backend="cpu").item() == 2**-12
    norm = {"scale": torch.full((1,), 1 + 2**-10), "shift": torch.zeros(1)}
    (dweight,) = torch.autograd.grad(causal_conv3d(x, weight, bias, **norm), weight)
    assert dweight.item() == 1 + 2**-10


X, WEIGHT = torch.zeros(1, 4, 3, 5, 6), torch.zeros(4, 4, 3, 3, 3)
FRAMES = torch.zeros(1, 4, 2, 5, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[B, C, T, H, W\].*got \(4, 3, 5, 6\)"),
        ({"x": X.int()}, TypeError, "x must be floating point, got torch.int32"),
        (
            {"weight": WEIGHT[:, :3]},
            ValueError,
            r"weight must be \[O, 4, kt, kh, kw\].*got \(4, 3,",
        ),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got \(3,\)"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on cpu.*got meta"),
        ({"scale": torch.ones(4)}, ValueError, "must come together, got scale alone"),
        ({"stride": (4, 1, 1)}, ValueError, r"stride must be .* \(3, 3, 3\), got \(4, 1, 1\)"),
        ({"stride": (1, 1)}, ValueError, r"stride must be .* got \(1, 1\)"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'silu', got 'relu'"),
        ({"post_activation": "relu"}, ValueError, "post_activation must be .* got 'relu'"),
        ({"residual": X[..., :5]}, ValueError, r"residual must be \(1, 4, 3, 5, 6\).*got \(1, 4"),
        ({"cache": FrameCache(FRAMES[..., :5])}, ValueError, "cache must come from a call with"),
        ({"cache": FrameCache(FRAMES[:, :, :1])}, ValueError, "cache must come from a call with"),
        (
            {"cache": FrameCache(), "weight": torch.zeros_like(WEIGHT, requires_grad=True)},
            ValueError,
            "has no gradient through a cache",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(changes, error, message):
    with pytest.raises(error, match=f"^causal_conv3d: .*{message}") as raised:
        causal_conv3d(**{"x": X, "weight": WEIGHT, "bias": None} | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight2", WEIGHT[:3], r"weight2 must be \(4, 4, 3, 3, 3\), got \(3, 4, 3, 3, 3\)"),
        ("weight1", WEIGHT[..., :1], r"weight1 must be \(4, 4, 3, 3, 3\), got \(4, 4, 3, 3, 1\)"),
        ("shift2", torch.zeros(5), r"shift2 must be \[4\], got \(5,\)"),
    ],
)
def test_a_bad_block_is_named_in_one_line(name, value, message):
    inputs = block_inputs([1, 4, 3, 5, 6], torch.float32)
    with pytest.raises(ValueError, match=f"^temporal_residual: {message}") as raised:
        temporal_residual(**inputs | {name: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 4, 1, 1, 17), r"a kernel of \(1, 1, 17\) is left to the reference"),
        ((65, 4, 1, 1, 1), "more than 64 channels are left to the reference"),
    ],
)
def test_what_the_cpu_kernels_leave_to_the_reference_is_named(shape, reason):
    with pytest.raises(NotImplementedError, match=f"backend 'cpu' cannot run .*{reason}"):
        causal_conv3d(X, torch.zeros(shape), None, backend="cpu")


def test_more_tiles_than_partial_sums_are_all_in_the_gradient():
    """A batch of 19 is 19 tiles, summed in 16 parts."""
    inputs = {"x": draw(19, 2, 2, 3, 5), "weight": draw(2, 2, 3, 3, 3, seed=1), "bias": draw(2)}
    inputs |= {"scale": draw(2, seed=2), "shift": draw(2, seed=3), "activation": "silu"}
    actual = value_and_gradients("causal_conv3d", partial(causal_conv3d, backend="cpu"), inputs)
    low, exact = (
        value_and_gradients("causal_conv3d", reference("causal_conv3d"), given)
        for given in (inputs, double(inputs))
    )
    for name in actual:
        assert_as_accurate(name, actual[name], low[name], exact[name])


def test_cpu_kernels_are_the_default_here():
    if library.MISSING:
        pytest.fail("the compiled library is part of these tests")
    with emu3_kernels.record_backends() as ran:
        causal_conv3d(X, WEIGHT, None)
        temporal_residual(**block_inputs([1, 4, 1, 2, 2], torch.float32))
    assert ran == {"causal_conv3d": "cpu", "temporal_residual": "cpu"}
