"""What is special about the group norms: large means, layouts, the resize, threads, errors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import group_norm_silu, spatial_norm_silu
from emu3_kernels.runtime import dispatch
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import (
    at_level,
    backends,
    cases,
    double,
    public,
    reference,
    value_and_gradients,
)

OPS = ("group_norm_silu", "spatial_norm_silu")
CPU = [b for b in backends("group_norm_silu") if b.startswith("cpu")]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs_of(op: str, index: int = -1, dtype: torch.dtype = torch.float32) -> dict:
    return cases(op).make(**cases(op).check[index], dtype=dtype, device="cpu")


@pytest.mark.parametrize("backend", [*CPU, "triton"])
def test_a_large_mean_costs_no_digits(backend):
    """E[x^2] - E[x]^2 of numbers around 3000 has no digit of a variance of 1 left in float32."""
    random = torch.Generator().manual_seed(0)
    x = 3000 + torch.randn(2, 32, 40, 50, generator=random)
    weight, bias = torch.ones(32), torch.zeros(32)
    name, level = at_level(backend)
    oracle = reference("group_norm_silu")
    with level:
        y = group_norm_silu(x, weight, bias, 8, backend=name)
    exact = oracle(x.double(), weight.double(), bias.double(), 8)
    assert_as_accurate("y", y, oracle(x, weight, bias, 8), exact)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dims", [4, 5])
def test_the_result_is_channels_last_whatever_the_input(op, backend, dims):
    size = next(s for s in cases(op).check[3:] if len(s["shape"]) == dims)
    inputs = cases(op).make(**size, dtype=torch.float32, device="cpu")
    assert inputs["x"].is_contiguous(memory_format=LAST[dims])
    y = public(op)(**inputs, backend=backend)
    plain = public(op)(**inputs | {"x": inputs["x"].contiguous()}, backend=backend)
    assert y.is_contiguous(memory_format=LAST[dims])
    assert plain.is_contiguous(memory_format=LAST[dims])
    assert torch.equal(y, plain)


@pytest.mark.parametrize("op", OPS)
def test_channels_last_memory_is_not_copied(op, monkeypatch):
    addresses = []
    present = dispatch.backends(op)
    forward = present["cpu"].forward

    def record(x, *rest):
        addresses.append(x.data_ptr())
        return forward(x, *rest)

    monkeypatch.setitem(present, "cpu", replace(present["cpu"], forward=record))
    inputs = inputs_of(op)
    public(op)(**inputs, backend="cpu")
    assert addresses == [inputs["x"].data_ptr()]


def resized_positions(
    positions: tuple[int, int], pixels: tuple[int, int], backend: str
) -> torch.Tensor:
    """Resize the numbers of the positions by a spatial norm whose normed x is zero."""
    latent = torch.arange(positions[0] * positions[1], dtype=torch.float32).view(1, 1, *positions)
    x, weight, bias = torch.randn(1, 1, *pixels), torch.zeros(1), torch.zeros(1)
    ones = torch.ones(1, 1)
    settings = {"groups": 1, "silu": False, "backend": backend}
    return spatial_norm_silu(x, latent, weight, bias, ones, bias, ones, bias, **settings)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("positions", "pixels"),
    [
        ((64, 3), (512, 24)),
        ((7, 5), (19, 4)),
        ((3, 11), (3, 23)),
        ((2, 2), (164, 166)),  # float64 would read another position at pixel 82
        ((41, 3), (11, 65)),  # positions of no pixel
    ],
)
def test_a_pixel_reads_the_position_that_interpolate_reads(positions, pixels, backend):
    latent = torch.arange(positions[0] * positions[1], dtype=torch.float32).view(1, 1, *positions)
    expected = F.interpolate(latent, size=pixels, mode="nearest")
    assert torch.equal(resized_positions(positions, pixels, backend), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("positions", "pixels"), [((2, 2), (164, 166)), ((7, 5), (19, 4))])
def test_a_position_gets_the_gradients_of_the_pixels_that_read_it(positions, pixels, backend):
    """Of ones: the number of pixels that read a position, as in the gradient of interpolate."""
    latent = torch.zeros(1, 1, *positions, requires_grad=True)
    x, zero, one = torch.randn(1, 1, *pixels), torch.zeros(1), torch.ones(1, 1)
    settings = {"groups": 1, "silu": False, "backend": backend}
    spatial_norm_silu(x, latent, zero, zero, one, zero, one, zero, **settings).sum().backward()
    plain = torch.zeros(1, 1, *positions, requires_grad=True)
    F.interpolate(plain, size=pixels, mode="nearest").sum().backward()
    assert torch.equal(latent.grad, plain.grad)


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op):
    size = cases(op).check[5] | {"shape": [3, 128, 64, 40]}
    inputs = cases(op).make(**size, dtype=torch.bfloat16, device="cpu")
    call = partial(public(op), backend="cpu")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(op, call, inputs))
    torch.set_num_threads(before)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("op", OPS)
def test_an_image_beyond_the_caches(op):
    """Above 16 MiB results are written past the caches, and images are taken one at a time."""
    size = cases(op).check[5] | {"shape": [2, 128, 96, 176]}
    inputs = cases(op).make(**size, dtype=torch.float32, device="cpu")
    oracle = reference(op)
    actual = value_and_gradients(op, partial(public(op), backend="cpu"), inputs)
    low = value_and_gradients(op, oracle, inputs)
    exact = value_and_gradients(op, oracle, double(inputs))
    for name in actual:
        assert_as_accurate(name, actual[name], low[name], exact[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 16, 4)}, r"x must be \[B, C, H, W\] or \[B, C, T, H, W\], got"),
        ({"groups": 3}, "groups must divide the channels of x, got 3 of"),
        ({"weight": torch.ones(8)}, r"weight must be \[16\] on cpu as x is .*, got \(8,\)"),
        ({"b_weight": torch.ones(16, 4, 1, 1)}, r"b_weight must be \[16, 4\] on cpu"),
        ({"latent": torch.ones(2, 4, 2, 2)}, r"latent must be \[1, L, t, h, w\] on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = inputs_of("spatial_norm_silu") | change
    with pytest.raises(ValueError, match=f"spatial_norm_silu: {message}"):
        spatial_norm_silu(**inputs)


def test_a_weight_of_another_dtype_is_refused_by_name_alone():
    inputs = inputs_of("group_norm_silu", dtype=torch.bfloat16)
    inputs["weight"] = inputs["weight"].float()
    with pytest.raises(NotImplementedError, match=r"float32 beside an x of torch\.bfloat16"):
        group_norm_silu(**inputs, backend="cpu")
    assert group_norm_silu(**inputs).dtype == torch.bfloat16
