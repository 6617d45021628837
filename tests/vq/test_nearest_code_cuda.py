"""The real CUDA kernel of nearest_code, run on the CPU under fiber.h."""

import struct

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels.testing.suite import cases, reference
from tests.gates.fibers import fiber

FEW, MANY = 10_000, 1
"""SMs of a GPU that the queries do not fill, and of one that they do."""


def on_fibers(z, codebook, num_multiprocessors, seed=0):
    """nearest_code of ``z`` ``[B, D, P]`` by the CUDA kernel, called as its binding calls it."""
    batch, dim, positions = z.shape
    padded = next(width for width in (4, 8, 16, 32) if dim <= width)
    codes = F.pad(codebook.float(), (0, padded - dim))
    data = fiber.raw(z)
    header = struct.pack(
        "11q", z.dtype == torch.bfloat16, batch * positions, positions, *z.stride(), dim, len(data),
        len(codebook), num_multiprocessors, seed,
    )  # fmt: skip
    out = fiber.run(fiber.build("run_nearest_code.cpp"), stdin=header + data + fiber.raw(codes))
    return torch.frombuffer(bytearray(out), dtype=torch.int64).view(batch, positions)


def make(batch, dim, positions, num_codes, dtype=torch.float32, on_grid=False):
    size = {"shape": (batch, dim, positions), "num_codes": num_codes, "on_grid": on_grid}
    return cases("nearest_code").make(**size, dtype=dtype, device="cpu").values()


@pytest.mark.parametrize("num_multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 4, 8, 13, 32])
def test_every_dimension(dim, dtype, num_multiprocessors):
    """4,099 codes of D 4 are four whole tiles and a ragged one; 301 positions are ragged."""
    z, codebook = make(2, dim, 301, 16384 // dim + 3, dtype)
    actual = on_fibers(z, codebook, num_multiprocessors)
    assert torch.equal(actual, reference("nearest_code")(z, codebook))


@pytest.mark.parametrize("num_codes", [1, 7, 8, 9, 128, 129, 1024, 1025])
def test_ties_go_to_the_lowest_code(num_codes):
    """Sizes around a group, a warp's share of a tile and a tile, with many equal distances."""
    z, codebook = make(1, 4, 65, num_codes, on_grid=True)
    codebook = (codebook * 2).round() / 2
    assert torch.equal(on_fibers(z, codebook, MANY), reference("nearest_code")(z, codebook))


def test_the_order_of_threads_changes_nothing():
    z, codebook = make(1, 4, 300, 2050, on_grid=True)
    first, *others = (on_fibers(z, codebook, FEW, seed) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_strides_are_followed():
    z, codebook = make(2, 4, 40, 100)
    channels_last = z.mT.contiguous().mT
    every_other = torch.stack([z, z], -1).flatten(2)[..., ::2]
    expected = reference("nearest_code")(z, codebook)
    assert torch.equal(on_fibers(channels_last, codebook, FEW), expected)
    assert torch.equal(on_fibers(every_other, codebook, FEW), expected)


def test_what_is_not_finite_gets_a_code_in_range():
    z, codebook = make(1, 4, 34, 1030)
    z[0, 0, 0], z[0, 1, 1], z[0, 2, 2] = torch.nan, torch.inf, -torch.inf
    z[0, :, 3] = 3e38
    codebook[0, 0], codebook[7, 1], codebook[1029, 2] = torch.nan, torch.inf, -torch.inf
    actual = on_fibers(z, codebook, MANY)
    assert torch.equal(actual, reference("nearest_code")(z, codebook))
    assert actual[0, :4].tolist() == [0, 0, 0, 0]


def test_near_ties_between_groups_are_decided_as_the_reference_decides_them():
    """Codes within a few units in the last place of one point: no score can tell them apart."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 40, generator=random)
    step = torch.randint(-3, 4, (1500, 4), generator=random) * 2**-23
    codebook = torch.ones(1500, 4) * (1 + step)
    assert torch.equal(on_fibers(z, codebook, MANY), reference("nearest_code")(z, codebook))


@pytest.mark.parametrize("scale", [1 / 2048, 1e-30, 1e18])
def test_codes_of_every_size_have_the_nearest_of_the_reference(scale):
    """The codebook of a new model is within 1 / N; norms of 1e38 overflow."""
    z, codebook = make(1, 4, 40, 2048)
    codebook *= scale
    assert torch.equal(on_fibers(z, codebook, MANY), reference("nearest_code")(z, codebook))
    z *= scale
    assert torch.equal(on_fibers(z, codebook, MANY), reference("nearest_code")(z, codebook))
