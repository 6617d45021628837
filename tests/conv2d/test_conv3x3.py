"""What is special about conv3x3: the calls it leaves to PyTorch, its error, single images."""

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import conv3x3, record_backends
from emu3_kernels.ops.conv2d import api
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.testing.suite import backends_of, cases, double, reference


def operands(dtype: torch.dtype = torch.bfloat16, **changes: object) -> dict:
    size = {"shape": [2, 32, 45, 47], "out": 64, "residual": True} | changes
    return cases("conv3x3").make(**size, dtype=dtype, device="cpu")


def ran(**inputs: object) -> str:
    with record_backends() as backends:
        conv3x3(**inputs)
    return backends["conv3x3"]


@pytest.mark.skipif(api.HAS_TILES, reason="oneDNN is faster on AMX")
def test_bfloat16_is_ours_and_the_rest_is_pytorch_s():
    assert ran(**operands()) == "cpu"
    assert ran(**operands(torch.float32)) == "aten"
    assert ran(**operands(shape=[9, 32, 40, 40])) == "aten"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32 would lose precision"),
        ({"shape": [1, 24, 48, 48]}, "24 to 64 channels are not multiples of 16 and 64"),
        ({"out": 96}, "32 to 96 channels are not multiples of 16 and 64"),
        ({"shape": [9, 32, 40, 41]}, "110 tiles of 4x4 pixels are fewer than 128"),
    ],
)
def test_what_cpu_leaves_to_others_is_named(changes, reason):
    with pytest.raises(NotImplementedError, match=f"^conv3x3: backend 'cpu' cannot.*{reason}"):
        conv3x3(**operands(**changes), backend="cpu")


def test_its_mean_error_is_that_of_one_rounding():
    """Winograd in bfloat16 would have ten times the error: it computes in float32."""
    inputs = operands(shape=[1, 256, 48, 48])
    exact = reference("conv3x3")(**double(inputs))
    error = (conv3x3(**inputs, backend="cpu").double() - exact).abs().mean()
    once = (exact.bfloat16().double() - exact).abs().mean()
    assert error < 1.01 * once


def test_an_image_does_not_depend_on_its_batch_nor_on_the_threads():
    inputs = operands(shape=[3, 32, 45, 47])
    whole = conv3x3(**inputs, backend="cpu")
    apart = {"weight": inputs["weight"], "bias": inputs["bias"], "backend": "cpu"}
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            images = zip(inputs["x"].split(1), inputs["residual"].split(1), strict=True)
            alone = [conv3x3(x, residual=residual, **apart) for x, residual in images]
            assert torch.cat(alone).equal(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("asked", [("x",), ("weight",), ("weight", "bias"), ("residual",)])
def test_no_gradient_is_computed_that_is_not_needed(asked, monkeypatch):
    inputs, computed = operands(), []
    y = conv3x3(**{name: t.requires_grad_() for name, t in inputs.items()}, backend="cpu")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    every = dict(zip(inputs, torch.autograd.grad(y, inputs.values(), dy), strict=True))

    def kept(*args):
        computed.extend(backward(*args))
        return computed

    cpu = backends_of("conv3x3")["cpu"]
    backward = cpu.backward
    monkeypatch.setitem(api.CONV3X3, "cpu", Backend(cpu.why_not, cpu.forward, kept))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in asked)
    conv3x3(**inputs, backend="cpu").backward(dy)
    names = ("x", "weight", "bias")
    assert [gradient is not None for gradient in computed] == [name in asked for name in names]
    assert all(inputs[name].grad.equal(every[name]) for name in asked)


def test_aten_is_pytorch_s_own_convolution():
    x, weight, bias, residual = operands(torch.float32).values()
    expected = F.conv2d(x, weight, bias, padding=1) + residual
    assert conv3x3(x, weight, bias, residual, backend="aten").equal(expected)


X, WEIGHT, BIAS = torch.zeros(1, 4, 5, 6), torch.zeros(8, 4, 3, 3), torch.zeros(8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[B, C, H, W\], got \(4, 5, 6\)"),
        ({"x": X.int()}, TypeError, "x must be floating point, got torch.int32"),
        (
            {"weight": WEIGHT[..., :1]},
            ValueError,
            r"weight must be \[O, 4, 3, 3\] .*got \(8",
        ),
        ({"weight": WEIGHT.double()}, ValueError, r"weight must be .* torch.float32 cpu, got"),
        ({"bias": BIAS[:3]}, ValueError, r"bias must be \(8,\) torch.float32 cpu, got \(3,\)"),
        ({"residual": X}, ValueError, r"residual must be \(1, 8, 5, 6\) .*got \(1, 4, 5, 6\)"),
    ],
)
def test_bad_input_is_named_in_one_line(changes, error, message):
    with pytest.raises(error, match=f"^conv3x3: {message}") as raised:
        conv3x3(**{"x": X, "weight": WEIGHT, "bias": BIAS} | changes)
    assert "\n" not in str(raised.value)
