"""The random words of dropout: Philox as published, alike on every backend and in every shard."""

from importlib.util import find_spec

import pytest
import torch

from emu3_kernels import _dropout

SEEDS = [torch.tensor(s) for s in (0, -1, 0x299F31D0A4093822, torch.iinfo(torch.int64).min)]
SHARES = [0.0, 0.1, 0.5, 1 - 2**-40]
TRITON = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


# Of Random123, the authors' own library: counter, key, words.
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
    given = _dropout.philox(torch.tensor(key), *(torch.tensor(c) for c in counter))
    assert [int(word) for word in given] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_kept_share_is_what_was_asked_for(p):
    """Over a million places, and over each of the four words: within five standard deviations."""
    rows, columns = torch.arange(1024)[:, None], torch.arange(1024)
    kept = _dropout.keep(torch.tensor(7), p, rows, columns, 3).double()
    for part in (kept, *kept.unflatten(1, (-1, 4)).unbind(-1)):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.mean() - (1 - p)) < 5 * deviation


def test_another_seed_row_column_or_head_is_another_mask():
    """Neighbours in any of them agree on half the places, as independent coins do."""
    rows, columns = torch.arange(256)[:, None], torch.arange(256)
    first = _dropout.keep(torch.tensor(7), 0.5, rows, columns, 3)
    for seed, row, column, head in [
        *((8, 0, 0, 3), (7 + (1 << 32), 0, 0, 3)),
        *((7, 1, 0, 3), (7, 0, 1, 3), (7, 0, 4, 3), (7, 0, 0, 4)),
    ]:
        other = _dropout.keep(torch.tensor(seed), 0.5, rows + row, columns + column, head)
        assert abs((first == other).double().mean() - 0.5) < 5 * 0.5 / 256


def test_a_shard_drops_what_the_whole_drops():
    whole = _dropout.keep(torch.tensor(7), 0.3, torch.arange(12)[:, None], torch.arange(40), 3)
    shard = _dropout.keep(
        torch.tensor(7), 0.3, 5 + torch.arange(7)[:, None], 9 + torch.arange(31), 3
    )
    assert torch.equal(shard, whole[5:, 9:])


def test_nothing_is_dropped_at_zero_and_almost_everything_below_one():
    rows, columns = torch.arange(64)[:, None], torch.arange(64)
    assert _dropout.keep(SEEDS[0], 0.0, rows, columns).all()
    assert not _dropout.keep(SEEDS[0], 1 - 2**-40, rows, columns).any()


def test_the_seed_comes_from_the_generator_of_torch():
    torch.manual_seed(3)
    first, second = _dropout.draw_seed(torch.device("cpu")), _dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert first == _dropout.draw_seed(torch.device("cpu")) != second
    assert (first.dim(), first.dtype) == (0, torch.int64)


@TRITON
@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_triton_keeps_what_the_definition_keeps(seed, p):
    from tests.kernels import philox

    expected = _dropout.keep(seed, p, torch.arange(3)[:, None], 6 + torch.arange(41), 5)
    assert torch.equal(philox.kept(seed, p, (3, 41), 6, 5), expected)


@TRITON
def test_the_code_that_triton_compiles_keeps_the_same(compiling):
    from tests.kernels import philox

    expected = _dropout.keep(SEEDS[2], 0.5, torch.arange(3)[:, None], 6 + torch.arange(41), 5)
    kept = compiling(philox.kept_emulated, SEEDS[2], 0.5, (3, 41), 6, 5)
    assert torch.equal(kept, expected)


@TRITON
def test_four_columns_share_a_philox(compiling):
    """Eight columns a thread take two Philoxes of ten rounds, two products each."""
    from tests.kernels import philox

    assert compiling(philox.products) <= 2 * 10 * 2
