"""The real CUDA kernels of causal_conv3d and temporal_residual, run on the CPU under fiber.h."""

import struct

import pytest
import torch

from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference
from tests.gates.fibers import fiber

FEW, MANY = 1, 10_000
"""SMs of a GPU that one block of frames fills, and of one that needs many."""
DTYPES = (torch.float32, torch.bfloat16)


def run(x, plan, residual, layers, *, results, is_block=False, multiprocessors=FEW, seed=0):
    """Call a kernel as its binding does; ``layers`` are of weight, bias, scale and shift."""
    weight, bias, scale, _ = layers[0]
    header = struct.pack(
        "21q", x.dtype == torch.bfloat16, is_block, *x.shape, weight.shape[0], results[2],
        weight.shape[2], weight.shape[3], plan.stride[0], plan.front, bias is not None,
        scale is not None, residual is not None, plan.silu, plan.post_silu, x.shape[4] % 4 == 0,
        multiprocessors, seed,
    )  # fmt: skip
    parts = [x]
    for weight, bias, scale, shift in layers:
        parts += [t if t is None else t.float() for t in (scale, shift, weight, bias)]
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
    results = out_shape(x, weight, plan)
    return run(x, plan, residual, [(weight, bias, scale, shift)], results=results, **settings)


def block_on_fibers(
    x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, **settings
):  # fmt: skip
    layers = [(weight1, bias1, scale1, shift1), (weight2, bias2, scale2, shift2)]
    plan = Plan(silu=True)
    return run(x, plan, None, layers, results=x.shape, is_block=True, **settings)


def fits(size):
    kernel, stride = size["kernel"], size.get("stride", [1, 1, 1])
    few = max(size["shape"][1], size["out"]) <= 16 and size["shape"][2] >= stride[0]
    return few and kernel[1:] in ([1, 1], [3, 3]) and stride[1:] == [1, 1] and size["shape"][0]


SIZES = [size for size in cases("causal_conv3d").check if fits(size)]
BLOCKS = [
    size
    for size in cases("temporal_residual").check
    if size["shape"][1] <= 4 and 0 not in size["shape"]
]


def by_two_convolutions(inputs, **settings):
    """Return the block as two convolutions, to which it must be equal bit by bit."""
    x, first, second = (
        inputs["x"],
        *(
            {"scale": inputs[f"scale{i}"], "shift": inputs[f"shift{i}"], "activation": "silu"}
            for i in "12"
        ),
    )
    hidden = conv_on_fibers(x, inputs["weight1"], inputs["bias1"], **first, **settings)
    weights = inputs["weight2"], inputs["bias2"]
    return conv_on_fibers(hidden, *weights, **second, residual=x, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_convolution(size, dtype):
    inputs = cases("causal_conv3d").make(**size, dtype=dtype, device="cpu")
    low, exact = reference("causal_conv3d")(**inputs), reference("causal_conv3d")(**double(inputs))
    assert_as_accurate("y", conv_on_fibers(**inputs), low, exact)


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*BLOCKS, {"shape": [1, 4, 19, 18, 36]}], ids=str)
def test_every_block(size, dtype, multiprocessors):
    """19 frames are two blocks of frames; the second recomputes four frames."""
    inputs = cases("temporal_residual").make(**size, dtype=dtype, device="cpu")
    low = reference("temporal_residual")(**inputs)
    exact = reference("temporal_residual")(**double(inputs))
    actual = block_on_fibers(**inputs, multiprocessors=multiprocessors)
    assert_as_accurate("y", actual, low, exact)
    assert torch.equal(actual, by_two_convolutions(inputs))


def test_chunks_of_a_video_equal_the_whole():
    size = {"shape": [1, 4, 7, 5, 12], "out": 4, "kernel": [3, 3, 3], "activation": "silu"}
    inputs = cases("causal_conv3d").make(**size, dtype=torch.float32, device="cpu")
    x, rest = inputs.pop("x"), inputs
    whole = conv_on_fibers(x, **rest)
    first, second = x[:, :, :3], x[:, :, 1:]
    chunks = [conv_on_fibers(first, **rest), conv_on_fibers(second, **rest, front=0)]
    assert torch.equal(torch.cat(chunks, dim=2), whole)


def test_the_order_of_threads_changes_nothing():
    inputs = cases("temporal_residual").make(
        shape=[1, 4, 3, 5, 9], dtype=torch.float32, device="cpu"
    )
    first, *others = (block_on_fibers(**inputs, seed=seed) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)
