"""What is special about linear: who runs it, bfloat16 products wherever PyTorch is slow at them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import linear, linear_cross_entropy, record_backends, widened
from emu3_kernels.ops.linear import cases
from emu3_kernels.ops.loss import linear_cross_entropy_cases as loss_cases
from emu3_kernels.ops.loss import linear_cross_entropy_reference as loss_reference
from emu3_kernels.runtime import gemm, library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import double, value_and_gradients

LEVELS = pytest.mark.parametrize("level", library.cpu_levels())


@pytest.fixture
def slow(monkeypatch):
    """Multiply as on a processor on which PyTorch is slow in bfloat16."""
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", True)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ran(dtype: torch.dtype) -> str:
    with record_backends() as backends:
        linear(draw(2, 3, dtype=dtype), draw(4, 3, dtype=dtype))
    return backends["linear"]


def test_bfloat16_is_native_where_pytorch_is_slow():
    assert ran(torch.bfloat16) == ("cpu" if gemm.SLOW_IN_BFLOAT16 else "aten")
    assert ran(torch.float32) == "aten"


def test_pytorch_is_slow_without_avx512_alone():
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert not (gemm.SLOW_IN_BFLOAT16 and has_avx512)


def test_native_leaves_float32_to_others():
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this call: torch\.float32"):
        linear(draw(2, 3).float(), draw(4, 3).float(), backend="cpu")


@LEVELS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6, 16, 17, 40, 200])
def test_a_product_is_written_or_added_whatever_the_layouts(rows, dtype, add, level, slow):
    """Blocks and few rows, rows or columns side by side, into part of a matrix, of either dtype."""
    depth, columns = 310, 101
    rest = draw(rows, columns, seed=2, dtype=dtype)
    for a in (draw(rows, depth), draw(depth, rows).t()):
        for b in (draw(depth, columns, seed=1), draw(columns, depth, seed=1).t()):
            exact = a.double() @ b.double() + (rest.double() if add else 0)
            low = (a.float() @ b.float() + (rest.float() if add else 0)).to(dtype)
            whole = torch.full((rows + 1, columns + 9), 7.0, dtype=dtype)
            out = whole[:rows, :columns].copy_(rest)
            with library.use_cpu_level(level):
                assert gemm.mm_(out, a, b, add=add) is out
            assert_as_accurate("out", out, low, exact)
            assert whole[rows].eq(7).all()
            assert whole[:, columns:].eq(7).all()


@LEVELS
@pytest.mark.parametrize("rows", [3, 500])
def test_no_result_depends_on_the_threads(rows, level):
    x, weight, threads = draw(rows, 700), draw(1000, 700, seed=1), torch.get_num_threads()
    results = []
    try:
        with library.use_cpu_level(level):
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(linear(x, weight, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_the_loss_of_a_head_multiplies_natively_too(memory, slow, monkeypatch):
    """A tile of classes at a time, or all of them."""
    monkeypatch.setattr(torch, "mm", None)
    inputs = loss_cases.make(**loss_cases.CHECK[-1], dtype=torch.bfloat16, device="cpu")
    call = partial(linear_cross_entropy, backend="cpu", memory=memory)
    actual = value_and_gradients("linear_cross_entropy", call, inputs)
    monkeypatch.undo()
    oracle = partial(
        value_and_gradients, "linear_cross_entropy", loss_reference.linear_cross_entropy
    )
    low, exact = oracle(inputs), oracle(double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


def test_what_pytorch_multiplies_slowly_is_widened_and_rounded_once(slow):
    x, weight = draw(1, 8, 9, 9), draw(4, 8, 3, 3, seed=1)
    call = partial(widened, F.conv2d, padding=1)
    expected = F.conv2d(x.float(), weight.float(), padding=1)
    assert call(x, weight, None).equal(expected.bfloat16())
    assert call(x.float(), weight.float(), None).equal(expected)


def test_a_gradient_alone_is_the_one_among_others():
    size = {"tokens": 20, "inputs": 30, "outputs": 40, "biased": True}
    leaves = cases.make(**size, dtype=torch.bfloat16, device="cpu")
    dy = draw(20, 40, seed=3)
    y = linear(**{name: leaf.requires_grad_() for name, leaf in leaves.items()}, backend="cpu")
    every = torch.autograd.grad(y, leaves.values(), dy)
    for wanted, expected in zip(leaves, every, strict=True):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        y = linear(**leaves, backend="cpu")
        assert torch.autograd.grad(y, leaves[wanted], dy)[0].equal(expected)


@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_autocast_narrows_it_as_it_does_pytorch_s(backend):
    x, weight, bias = (draw(*shape).float() for shape in ((9, 30), (40, 30), (40,)))
    narrow = (tensor.bfloat16() for tensor in (x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, bias, backend=backend)
    assert y.equal(linear(*narrow, backend=backend))


def test_single_vectors_and_empty_batches_keep_their_shape():
    weight, bias = draw(5, 3), draw(5)
    for shape in ((3,), (0, 3), (2, 0, 3), (2, 4, 3)):
        x = draw(*shape)
        y, expected = (linear(x, weight, bias, backend=b) for b in ("cpu", "reference"))
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected)


X, WEIGHT, BIAS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be floating point, got torch.int32"),
        ({"x": X[0, 0]}, ValueError, r"x must be \[..., D\], got \(\)"),
        ({"weight": BIAS}, ValueError, r"weight must be \[O, D\], got \(5,\)"),
        ({"weight": WEIGHT.t()}, ValueError, r"weight must be \(3, 3\).*as x is \(2, 3\), got"),
        ({"weight": WEIGHT.double()}, ValueError, r"weight must be .* torch.float32 cpu .*, got"),
        ({"bias": BIAS[:3]}, ValueError, r"bias must be \(5,\) torch.float32 cpu .*got \(3,\)"),
    ],
)
def test_bad_input_is_named_in_one_line(changes, error, message):
    with pytest.raises(error, match=f"^linear: {message}") as raised:
        linear(**{"x": X, "weight": WEIGHT, "bias": BIAS} | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bias", [draw(1).expand(96), draw(192)[::2]])
def test_a_bias_may_have_any_stride(rows, bias):
    assert not bias.is_contiguous()
    y = linear(draw(rows, 8), torch.zeros_like(draw(96, 8)), bias, backend="cpu")
    assert y.equal(bias.expand(rows, 96))


def test_autocast_leaves_float64_alone_as_it_does_for_pytorch():
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).equal(F.linear(x, weight))
        with pytest.raises(TypeError, match="x must be floating point"):
            linear(x.long(), weight)
