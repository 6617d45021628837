"""The random words of dropout: Philox as published, the same on every backend and shard.

Also ``add_rms_norm`` with dropout beyond the generic suite.
"""

from importlib.util import find_spec

import pytest
import torch
from torch.utils._pytree import tree_map

from emu3_kernels import add_rms_norm
from emu3_kernels.ops.norm.cases import CASES
from emu3_kernels.runtime import dropout
from emu3_kernels.testing.suite import at_level, backends, value_and_gradients

SEEDS = [torch.tensor(s) for s in (0, -1, 0x299F31D0A4093822, torch.iinfo(torch.int64).min)]
PROBABILITIES = [0.0, 0.1, 0.5, 1 - 2**-40]
TRITON = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


# From Random123, the authors' own library: counter, key, words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    given = dropout.philox(torch.tensor(key), *(torch.tensor(c) for c in counter))
    assert [int(word) for word in given] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_fraction_of_kept_elements_is_one_minus_p(p):
    """Of a million elements, and of each of the four words: within five standard deviations."""
    rows, columns = torch.arange(1024)[:, None], torch.arange(1024)
    kept = dropout.keep(torch.tensor(7), p, rows, columns, 3).double()
    for part in (kept, *kept.unflatten(1, (-1, 4)).unbind(-1)):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.mean() - (1 - p)) < 5 * deviation


def test_another_seed_row_column_or_head_is_another_mask():
    """Two masks agree on half the elements, as independent ones do."""
    rows, columns = torch.arange(256)[:, None], torch.arange(256)
    first = dropout.keep(torch.tensor(7), 0.5, rows, columns, 3)
    for seed, row, column, head in [
        *((8, 0, 0, 3), (7 + (1 << 32), 0, 0, 3)),
        *((7, 1, 0, 3), (7, 0, 1, 3), (7, 0, 4, 3), (7, 0, 0, 4)),
    ]:
        other = dropout.keep(torch.tensor(seed), 0.5, rows + row, columns + column, head)
        assert abs((first == other).double().mean() - 0.5) < 5 * 0.5 / 256


def test_a_shard_drops_what_the_whole_drops():
    whole = dropout.keep(torch.tensor(7), 0.3, torch.arange(12)[:, None], torch.arange(40), 3)
    shard = dropout.keep(
        torch.tensor(7), 0.3, 5 + torch.arange(7)[:, None], 9 + torch.arange(31), 3
    )
    assert torch.equal(shard, whole[5:, 9:])


def test_nothing_is_dropped_at_zero_and_almost_everything_below_one():
    rows, columns = torch.arange(64)[:, None], torch.arange(64)
    assert dropout.keep(SEEDS[0], 0.0, rows, columns).all()
    assert not dropout.keep(SEEDS[0], 1 - 2**-40, rows, columns).any()


def test_the_seed_comes_from_the_generator_of_torch():
    torch.manual_seed(3)
    first, second = dropout.draw_seed(torch.device("cpu")), dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert first == dropout.draw_seed(torch.device("cpu")) != second
    assert (first.dim(), first.dtype) == (0, torch.int64)


@TRITON
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_triton_keeps_what_the_definition_keeps(seed, p):
    from tests.runtime import philox

    expected = dropout.keep(seed, p, torch.arange(3)[:, None], 6 + torch.arange(41), 5)
    assert torch.equal(philox.kept(seed, p, (3, 41), 6, 5), expected)


@TRITON
def test_the_code_that_triton_compiles_keeps_the_same(emulating):
    from tests.runtime import philox

    expected = dropout.keep(SEEDS[2], 0.5, torch.arange(3)[:, None], 6 + torch.arange(41), 5)
    kept = emulating(philox.kept_emulated, SEEDS[2], 0.5, (3, 41), 6, 5)
    assert torch.equal(kept, expected)


@TRITON
def test_four_columns_share_a_philox(compiling):
    """Eight columns a thread take two Philoxes of ten rounds, two products each."""
    from tests.runtime import philox

    assert compiling(philox.num_multiplies) <= 2 * 10 * 2


def ones_kept(backend, p, seed, dtype=torch.float32):
    """The sum for x of ones: a ragged row, too wide for registers."""
    ones = torch.ones(3, 16425, dtype=dtype)
    name, level = at_level(backend)
    with level:
        _, summed = add_rms_norm(
            *(ones, ones - ones, ones[0]), dropout_p=p, seed=seed, backend=name
        )
    return summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 1 - 2**-40])
@pytest.mark.parametrize("backend", list(backends("add_rms_norm")))
def test_every_backend_keeps_the_same_elements(backend, p, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16
    for seed in SEEDS:
        kept = dropout.keep(seed, p, torch.arange(3)[:, None], torch.arange(16425))
        scaled = kept * torch.tensor(dropout.keep_scale(p), dtype=torch.float32)
        assert torch.equal(ones_kept(backend, p, seed, dtype), scaled.to(dtype))


@pytest.mark.parametrize("backend", [*backends("add_rms_norm"), "reference"])
def test_the_gradient_has_the_mask_of_the_forward_pass(backend):
    """The gradient of the residual has none; neither depends on the leading dimensions."""
    name, level = at_level(backend)
    x = torch.randn(2, 3, 41).requires_grad_()
    residual = torch.zeros_like(x).requires_grad_()
    with level:
        y, summed = add_rms_norm(
            x, residual, torch.ones(41), dropout_p=0.5, seed=SEEDS[2], backend=name
        )
        dx, dresidual = torch.autograd.grad(y.square().sum() + summed.sum(), (x, residual))
    kept = dropout.keep(SEEDS[2], 0.5, torch.arange(6)[:, None], torch.arange(41)).view_as(x)
    assert torch.equal(summed != 0, kept)
    assert torch.equal(dx != 0, kept)
    assert torch.equal(dx[kept], 2 * dresidual[kept])
    assert dresidual.all()


def value_and_gradients_of(x, residual, weight, backend, rows=None):
    """Of ``summed``, whose mask is that of ``y`` too."""
    name, level = at_level(backend)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual)]
    drops = {"dropout_p": 0.5, "seed": SEEDS[2], "dropout_rows": rows}
    with level:
        _, summed = add_rms_norm(*leaves, weight, **drops, backend=name)
        return summed.detach(), *torch.autograd.grad(summed.square().sum(), leaves)


@pytest.mark.parametrize("width", [41, 16425])
@pytest.mark.parametrize("backend", [*backends("add_rms_norm"), "reference"])
def test_rows_of_a_rank_drop_what_they_drop_in_the_whole(backend, width):
    """Tokens 0 and 2 of both sequences of three, as a rank of a ring holds them."""
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, width, generator=random) for _ in range(2))
    weight, own = torch.ones(width), [0, 2]
    whole = value_and_gradients_of(x, residual, weight, backend)
    rows = torch.arange(6).view(2, 3)[:, own]
    part = value_and_gradients_of(x[:, own], residual[:, own], weight, backend, rows)
    assert all(torch.equal(p, w[:, own]) for p, w in zip(part, whole, strict=True))


def test_rows_beyond_31_bits_count_by_their_lower_32():
    ones = torch.ones(1, 64)
    drops = {"dropout_p": 0.5, "seed": SEEDS[2]}
    for row in (2**31 + 5, 2**32 - 1, 2**32 + 7):
        given = torch.tensor([row])
        masks = [
            add_rms_norm(ones, ones - 1, ones[0], **drops, dropout_rows=given, backend=name)[1]
            for name in ("cpu", "triton", "reference")
        ]
        expected = dropout.keep(SEEDS[2], 0.5, given[:, None], torch.arange(64))
        assert all(torch.equal(mask != 0, expected) for mask in masks)


def test_rows_of_another_shape_or_dtype_raise():
    x = torch.ones(2, 8)
    for rows in (torch.arange(3), torch.arange(2).int(), torch.arange(2)[:, None]):
        with pytest.raises(ValueError, match=r"add_rms_norm: dropout_rows must be \(2,\) torch.in"):
            add_rms_norm(x, x, x[0], dropout_p=0.5, dropout_rows=rows)


def test_the_seeds_of_the_sites_of_a_step_are_its_own():
    """Of 1,000 steps of two runs, all differ; a step that is repeated has the same."""
    seeds = torch.stack([dropout.site_seeds(s, i, 7) for s in (0, -5) for i in range(500)])
    assert (seeds.dtype, seeds.unique().numel()) == (torch.int64, seeds.numel())
    assert torch.equal(dropout.site_seeds(-5, 3, 7), seeds[503])
    assert torch.equal(dropout.site_seeds(-5, 3, 4), seeds[503, :4])


@pytest.mark.parametrize("backend", [*backends("add_rms_norm"), "reference"])
def test_without_a_seed_one_is_drawn(backend):
    x, weight = torch.randn(4, 256), torch.ones(256)
    name, level = at_level(backend)

    torch.manual_seed(0)
    with level:
        first, second = (
            add_rms_norm(x, x, weight, dropout_p=0.5, backend=name)[1] for _ in range(2)
        )
    torch.manual_seed(0)
    seed = dropout.draw_seed(x.device)
    _, expected = add_rms_norm(x, x, weight, dropout_p=0.5, seed=seed, backend="reference")
    assert torch.equal(first, expected)
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing_and_adds_alike():
    """The random numbers after it are those after a call without the argument."""
    x, weight = torch.randn(4, 256), torch.ones(256)
    before = torch.get_rng_state()
    plain, zero = add_rms_norm(x, x, weight), add_rms_norm(x, x, weight, dropout_p=0, seed=SEEDS[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert tree_map(torch.equal, plain, zero) == (True, True)


def dropped_inputs():
    size = {"num_rows": 37, "width": 41, "dropout_p": 0.1}
    return CASES["add_rms_norm"].make(**size, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_compiles_as_one_graph(backend, drawn):
    torch.compiler.reset()
    inputs = dropped_inputs() | {"backend": backend}
    if drawn:
        inputs["seed"] = None
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, add_rms_norm):
        torch.manual_seed(0)
        results.append(value_and_gradients("add_rms_norm", function, inputs))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_the_ops_of_the_library_are_registered_right():
    inputs = dropped_inputs()
    x, residual, weight, p, seed = inputs.values()
    ops = torch.ops.emu3_kernels
    rows = torch.arange(len(x)) + 5
    forward = x, residual, weight, 1e-5, p, seed, rows
    torch.library.opcheck(ops.add_rms_norm_forward, forward)
    _, summed, rstd = ops.add_rms_norm_forward(*forward)
    backward = x, residual, summed, weight, rstd, p, seed, rows
    torch.library.opcheck(ops.add_rms_norm_backward_dropped, backward)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_invalid_probability_raises(p):
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"add_rms_norm: dropout_p must lie in \[0, 1\), got "):
        add_rms_norm(x, x, x[0], dropout_p=p)


@pytest.mark.parametrize("seed", [torch.tensor([1]), torch.tensor(1.0), torch.tensor(1).int()])
def test_an_invalid_seed_raises(seed):
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"seed must be \(\) torch.int64 cpu, got \(1?,?\) torch"):
        add_rms_norm(x, x, x[0], dropout_p=0.5, seed=seed)
