"""quantized_linear: codes, rounding, tiles, splits and errors. The generic suite checks values."""

import pytest
import torch

from emu3_kernels import quantize_weight, quantized_linear
from emu3_kernels.ops.quantized import cpu
from emu3_kernels.ops.quantized.cases import make
from emu3_kernels.ops.quantized.codes import dequantize, unpack
from emu3_kernels.ops.quantized.reference import quantized_linear as reference
from emu3_kernels.runtime.counters import counters
from emu3_kernels.runtime.launch import Gpu, assume_gpu
from emu3_kernels.testing.budget import assert_as_accurate


def test_int8_rounds_ties_to_even_by_the_largest_of_an_output():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.0], [0.0] * 5, [-254.0, 3.0, 1.0, 5.0, 2.0]])
    codes, scales = quantize_weight(weight)
    assert codes.dtype == torch.int8
    assert scales.tolist() == [1.0, 0.0, 2.0]
    assert codes.tolist() == [[127, 0, 2, -2, 0], [0] * 5, [-127, 2, 0, 2, 1]]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_has_a_scale_for_each_group_and_two_codes_a_byte(group_size):
    weight = torch.arange(-7, 8).float().repeat(30)[: 3 * 128].view(1, -1).contiguous()
    weight *= torch.arange(1, 3 * 128 // group_size + 1).repeat_interleave(group_size)
    codes, scales = quantize_weight(weight, "int4", group_size=group_size)
    assert (codes.dtype, codes.shape) == (torch.uint8, (1, 3 * 64))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (1, 3 * 128 // group_size))
    assert dequantize(codes, scales, torch.float32).equal(weight)
    first, sixteenth = unpack(codes)[0, [0, 16]]
    assert int(codes[0, 0]) == int(first) + 8 + 16 * (int(sixteenth) + 8)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_weight_is_off_by_half_a_step_at_most(bits):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = quantize_weight(weight, bits)
    step = scales.float()[:, None] if bits == "int8" else scales.float().repeat_interleave(64, 1)
    error = (dequantize(codes, scales, torch.float64) - weight.double()).abs()
    # A scale of int4 is rounded to bfloat16: the largest weight may lie 7 / 256 of a step outside.
    assert (error <= step * (0.5 + 7 / 256)).all()
    assert error.max() > 0.4 * step.min()


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rows_of_the_codes_give_those_outputs(bits):
    inputs = make(num_rows=2, num_in=192, num_out=100, bits=bits, dtype=torch.float32, device="cpu")
    rows, whole = slice(37, 90), quantized_linear(**inputs)
    some = quantized_linear(inputs["x"], inputs["codes"][rows], inputs["scales"][rows])
    assert some.equal(whole[:, rows])


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_others(bits):
    """A seed then draws the same image alone and in any batch."""
    size = {"num_in": 4480, "num_out": 40, "bits": bits}
    inputs = make(num_rows=15, **size, dtype=torch.bfloat16, device="cpu")
    whole = quantized_linear(**inputs)
    for row in range(15):
        alone = quantized_linear(inputs["x"][row], inputs["codes"], inputs["scales"])
        torch.testing.assert_close(alone, whole[row], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_multiplied_in_tiles(bits, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "TILE", 30 * 128)
    inputs = make(num_rows=17, num_in=128, num_out=100, bits=bits, dtype=dtype, device="cpu")
    exact = reference(**{name: v.double() if name != "codes" else v for name, v in inputs.items()})
    y = quantized_linear(**inputs, backend="cpu")
    assert_as_accurate("y", y, reference(**inputs), exact)


@pytest.mark.parametrize(("bits", "group_size"), [("int8", 64), ("int4", 32), ("int4", 128)])
def test_triton_adds_the_splits_of_the_inputs_in_order(bits, group_size):
    """On 132 SMs, 70 outputs have many splits; 40 inputs of the last are fewer than a block."""
    pytest.importorskip("triton")
    size = {"num_rows": 5, "num_in": 2088 if bits == "int8" else 2176, "num_out": 70}
    inputs = make(**size, bits=bits, group_size=group_size, dtype=torch.float32, device="cpu")
    with assume_gpu(Gpu(32, 132, 90)):
        y = quantized_linear(**inputs, backend="triton")
        again = quantized_linear(**inputs, backend="triton")
    exact = reference(**{name: v.double() if name != "codes" else v for name, v in inputs.items()})
    assert_as_accurate("y", y, reference(**inputs), exact)
    assert again.equal(y)
    assert not counters(y, 3).any()


def bad(**changes):
    inputs = make(num_rows=2, num_in=64, num_out=6, bits="int4", dtype=torch.float32, device="cpu")
    return inputs | changes


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (bad(codes=torch.zeros(6, 32)), r"codes must be \[N, K\] torch.int8 or \[N, K / 2\] "),
        (bad(x=torch.zeros(2, 63)), r"x must be \[\.\.\., 64\] on cpu as codes are \(6, 32\)"),
        (bad(scales=torch.zeros(5, 1)), r"scales must be \[6, 64 / \(32, 64, 128\)\] on cpu, got"),
        (bad(scales=torch.zeros(6, 4)), r"scales must be \[6, 64 / \(32, 64, 128\)\] on cpu, got"),
        (bad(x=torch.zeros(2, 64, requires_grad=True)), "x must have no gradient"),
    ],
)
def test_a_call_that_cannot_run_is_refused_in_one_line(inputs, line):
    with pytest.raises(ValueError, match=f"^quantized_linear: {line}"):
        quantized_linear(**inputs)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((torch.zeros(4, 64), "int3"), r"bits must be one of \('int8', 'int4'\), got 'int3'"),
        ((torch.zeros(4, 48), "int4"), "group_size must be one of .* divide K = 48, got 64"),
        ((torch.zeros(4), "int8"), r"weight must be \[N, K\], got \(4,\)"),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_refused_in_one_line(arguments, line):
    with pytest.raises(ValueError, match=f"^quantize_weight: {line}"):
        quantize_weight(*arguments)
