"""GEMMs where PyTorch is slow in bfloat16: values, gradients, layouts, threads, autocast."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import linear_cross_entropy
from emu3_kernels.runtime import gemm, library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference, value_and_gradients

LEVELS = pytest.mark.parametrize("level", library.cpu_levels())
SIZES = [
    {"tokens": 0, "inputs": 8, "outputs": 5},
    {"tokens": 3, "inputs": 0, "outputs": 7},
    {"tokens": 1, "inputs": 41, "outputs": 37, "biased": True},
    {"tokens": 15, "inputs": 300, "outputs": 70},  # few rows: four, two and one at a time
    {"tokens": 197, "inputs": 300, "outputs": 500, "biased": True},  # two blocks of each, ragged
]


@pytest.fixture
def slow(monkeypatch):
    """Run GEMMs as on a CPU where PyTorch is slow in bfloat16."""
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", True)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(
    *, tokens: int, inputs: int, outputs: int, biased: bool = False, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Draw inputs of a linear layer whose results are about one."""
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random).to(dtype)

    weight = draw(outputs, inputs) / max(inputs, 1) ** 0.5
    found = {"x": draw(tokens, inputs), "weight": weight}
    return found | ({"bias": draw(outputs)} if biased else {})


def exact_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), weight.to(compute), bias).to(x.dtype)


def with_gradients(function, inputs: dict) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@LEVELS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients(size, dtype, level, slow):
    inputs = make(**size, dtype=dtype)
    with library.use_cpu_level(level):
        actual = with_gradients(gemm.linear, inputs)
    low = with_gradients(exact_linear, inputs)
    exact = with_gradients(exact_linear, double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in rows twice as long."""
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


@LEVELS
@pytest.mark.parametrize("layout", [strided, transposed])
def test_the_layout_of_the_inputs_changes_nothing(layout, level, slow):
    inputs = make(**SIZES[-1], dtype=torch.bfloat16)
    relaid = {name: layout(tensor) for name, tensor in inputs.items()}
    with library.use_cpu_level(level):
        expected = with_gradients(gemm.linear, inputs)
        actual = with_gradients(gemm.linear, relaid)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_it_compiles_as_one_graph(slow):
    torch.compiler.reset()
    inputs = make(**SIZES[-1], dtype=torch.bfloat16)
    compiled = torch.compile(gemm.linear, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, inputs)
    for name, expected in with_gradients(gemm.linear, inputs).items():
        assert torch.equal(actual[name], expected), name


def test_the_native_ops_are_registered_right():
    a, b, out = draw(5, 30), draw(30, 7), draw(5, 7)
    torch.library.opcheck(torch.ops.emu3_kernels.matmul.default, (a, b, draw(1, 7)))
    torch.library.opcheck(torch.ops.emu3_kernels.matmul_into.default, (a, b, None, out))


def test_float32_is_left_to_pytorch(slow, monkeypatch):
    monkeypatch.setattr(gemm, "matmul", None)
    x, weight = draw(2, 3).float(), draw(4, 3).float()
    assert gemm.linear(x, weight).equal(F.linear(x, weight))


def test_pytorch_is_slow_without_avx512_alone():
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert not (gemm.SLOW_IN_BFLOAT16 and has_avx512)


@LEVELS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6, 16, 17, 40, 200])
def test_a_gemm_is_written_or_added_in_every_layout(rows, dtype, add, level, slow):
    """Blocks and few rows, row-major or column-major, into part of a matrix, of either dtype."""
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
def test_no_result_depends_on_the_threads(rows, level, slow):
    x, weight, threads = draw(rows, 700), draw(1000, 700, seed=1), torch.get_num_threads()
    results = []
    try:
        with library.use_cpu_level(level):
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(gemm.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_the_loss_of_a_head_runs_our_gemm_too(memory, slow, monkeypatch):
    """A chunk of classes at a time, or all of them."""
    monkeypatch.setattr(torch, "mm", None)
    case = cases("linear_cross_entropy")
    inputs = case.make(**case.check[-1], dtype=torch.bfloat16, device="cpu")
    call = partial(linear_cross_entropy, backend="cpu", memory=memory)
    actual = value_and_gradients("linear_cross_entropy", call, inputs)
    monkeypatch.undo()
    truth = reference("linear_cross_entropy")
    oracle = partial(value_and_gradients, "linear_cross_entropy", truth)
    low, exact = oracle(inputs), oracle(double(inputs))
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


def test_a_slow_convolution_runs_in_float32_and_rounds_once(slow):
    x, weight = draw(1, 8, 9, 9), draw(4, 8, 3, 3, seed=1)
    call = partial(gemm.in_float32_if_slow, F.conv2d, padding=1)
    expected = F.conv2d(x.float(), weight.float(), padding=1)
    assert call(x, weight, None).equal(expected.bfloat16())
    assert call(x.float(), weight.float(), None).equal(expected)


def test_a_gradient_alone_is_the_one_among_others(slow):
    size = {"tokens": 20, "inputs": 30, "outputs": 40, "biased": True}
    leaves = make(**size, dtype=torch.bfloat16)
    dy = draw(20, 40, seed=3)
    y = gemm.linear(**{name: leaf.requires_grad_() for name, leaf in leaves.items()})
    every = torch.autograd.grad(y, leaves.values(), dy)
    for wanted, expected in zip(leaves, every, strict=True):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        y = gemm.linear(**leaves)
        assert torch.autograd.grad(y, leaves[wanted], dy)[0].equal(expected)


@pytest.mark.parametrize("is_slow", [True, False])
def test_autocast_casts_the_operands_as_pytorch_does(is_slow, monkeypatch):
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", is_slow)
    x, weight, bias = (draw(*shape).float() for shape in ((9, 30), (40, 30), (40,)))
    narrow = (tensor.bfloat16() for tensor in (x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gemm.linear(x, weight, bias)
    assert y.equal(gemm.linear(*narrow))


def test_single_vectors_and_empty_batches_keep_their_shape(slow):
    weight, bias = draw(5, 3), draw(5)
    for shape in ((3,), (0, 3), (2, 0, 3), (2, 4, 3)):
        x = draw(*shape)
        y, expected = (f(x, weight, bias) for f in (gemm.linear, exact_linear))
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 5)), ((2, 3), (5,)), ((2, 3), (5, 3), (3,)), ((2, 3), (5, 3), (1, 5))]
)
def test_a_wrong_shape_raises(shapes, slow):
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        gemm.linear(*(draw(*shape) for shape in shapes))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bias", [draw(1).expand(96), draw(192)[::2]])
def test_a_bias_may_have_any_stride(rows, bias, slow):
    assert not bias.is_contiguous()
    y = gemm.linear(draw(rows, 8), torch.zeros_like(draw(96, 8)), bias)
    assert y.equal(bias.expand(rows, 96))


def test_autocast_leaves_float64_alone_as_pytorch_does(slow):
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert gemm.linear(x, weight).equal(F.linear(x, weight))
