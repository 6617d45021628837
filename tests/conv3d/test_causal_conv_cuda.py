"""The real CUDA kernel of causal_conv3d and temporal_residual, run on the CPU under fiber.h."""

import struct

import pytest
import torch

from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference
from tests.gates.fibers import fiber

FEW, MANY = 1, 10_000
"""SMs of a GPU that tall tiles fill, and of one that needs flat ones."""
DTYPES = (torch.float32, torch.bfloat16)


def run(x, plan, residual, weight, bias, scale, shift, *, multiprocessors=FEW, seed=0):
    """Call the kernel as its binding does; parameters are in float32 unless all are bfloat16."""
    results = out_shape(x, weight, plan)
    parameters = [p for p in (scale, shift, weight, bias) if p is not None]
    narrow = all(p.dtype == torch.bfloat16 for p in parameters)
    header = struct.pack(
        "21q", x.dtype == torch.bfloat16, narrow, *x.shape, weight.shape[0], results[2],
        weight.shape[2], weight.shape[3], plan.stride[0], plan.front, bias is not None,
        scale is not None, residual is not None, plan.silu, plan.post_silu, x.shape[4] % 4 == 0,
        multiprocessors, seed,
    )  # fmt: skip
    parts = [x, *(p if narrow else p.float() for p in parameters)]
    data = b"".join(raw(part) for part in (*parts, residual) if part is not None)
    out = fiber.run(fiber.build("run_causal_conv.cpp"), stdin=header + data)
    return torch.frombuffer(bytearray(out), dtype=x.dtype).view(results)


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def conv_on_fibers(
    x, weight, bias, *, stride=(1, 1, 1), scale=None, shift=None, activation=None,
    post_activation=None, residual=None, front=None, **settings,
):  # fmt: skip
    front = weight.shape[2] - stride[0] if front is None else front
    plan = Plan(stride, front, activation == "silu", post_activation == "silu")
    return run(x, plan, residual, weight, bias, scale, shift, **settings)


def fits(size):
    kernel, stride = size["kernel"], size.get("stride", [1, 1, 1])
    few = max(size["shape"][1], size["out"]) <= 16 and size["shape"][2] >= stride[0]
    return few and kernel[1:] in ([1, 1], [3, 3]) and stride[1:] == [1, 1] and size["shape"][0]


SIZES = [size for size in cases("causal_conv3d").check if fits(size)]


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_convolution(size, dtype, multiprocessors):
    inputs = cases("causal_conv3d").make(**size, dtype=dtype, device="cpu")
    low, exact = reference("causal_conv3d")(**inputs), reference("causal_conv3d")(**double(inputs))
    actual = conv_on_fibers(**inputs, multiprocessors=multiprocessors)
    assert_as_accurate("y", actual, low, exact)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_the_tile_changes_no_bit(channels):
    """A video in pieces has other tiles than the whole."""
    size = {"shape": [1, channels, 4, 11, 36], "out": channels, "kernel": [3, 3, 3]}
    inputs = cases("causal_conv3d").make(**size, norm=True, dtype=torch.float32, device="cpu")
    tall, flat = (conv_on_fibers(**inputs, multiprocessors=n) for n in (FEW, MANY))
    assert torch.equal(tall, flat)


def test_parameters_in_bfloat16_are_converted_in_the_kernel():
    size = {"shape": [1, 4, 2, 3, 8], "out": 4, "kernel": [3, 3, 3], "norm": True}
    inputs = cases("causal_conv3d").make(**size, dtype=torch.bfloat16, device="cpu")
    in_float32 = {
        name: value.float() if name in ("weight", "bias", "scale", "shift") else value
        for name, value in inputs.items()
    }
    assert torch.equal(conv_on_fibers(**inputs), conv_on_fibers(**in_float32))


def test_chunks_of_a_video_equal_the_whole():
    size = {"shape": [1, 4, 7, 5, 12], "out": 4, "kernel": [3, 3, 3], "activation": "silu"}
    inputs = cases("causal_conv3d").make(**size, dtype=torch.float32, device="cpu")
    x, rest = inputs.pop("x"), inputs
    whole = conv_on_fibers(x, **rest)
    first, second = x[:, :, :3], x[:, :, 1:]
    chunks = [conv_on_fibers(first, **rest), conv_on_fibers(second, **rest, front=0)]
    assert torch.equal(torch.cat(chunks, dim=2), whole)


def test_the_order_of_threads_changes_nothing():
    size = {"shape": [1, 4, 3, 5, 9], "out": 4, "kernel": [3, 3, 3], "norm": True}
    inputs = cases("causal_conv3d").make(**size, dtype=torch.float32, device="cpu")
    first, *others = (conv_on_fibers(**inputs, seed=seed) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)
