"""Order, mixture and packing: bijections, shares, and rows without a split image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.data.order import Mixture, drawn, key_of, permuted, uniform
from emu3.data.packing import pack


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 65, 1000, 23508])
def test_every_document_has_one_place(count):
    places = permuted(np.arange(count), count, key_of(7))
    assert sorted(places.tolist()) == list(range(count))


def test_the_order_depends_on_the_seed_and_not_on_the_order_before():
    count = 10_000
    one, other = (permuted(np.arange(count), count, key_of(seed)) for seed in (1, 2))
    for a, b in ((np.arange(count), one), (one, other), (one[:-1], one[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # 3 standard errors
    assert permuted(np.array([5, 17]), count, key_of(1)).tolist() == one[[5, 17]].tolist()


def test_of_a_thousand_million_documents_any_draw_is_found_at_once():
    places = permuted(np.arange(10_000), 10**9, key_of(3))
    assert len(np.unique(places)) == 10_000
    assert 0 <= places.min() < 10**6 < 10**9 - 10**6 < places.max() < 10**9


def test_every_epoch_has_every_document_in_another_order():
    documents = drawn(np.arange(35), 10, "seed")
    epochs = documents[:30].reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn(np.arange(8, 14), 10, "seed").tolist() == documents[8:14].tolist()


def test_random_numbers_are_uniform_and_keys_independent():
    one, other = (uniform(np.arange(20_000), key_of("a", n)) for n in range(2))
    assert np.abs(np.histogram(one, 10, (0, 1))[0] - 2000).max() < 4 * 2000**0.5
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_windows_have_the_shares_of_the_mixture_and_miss_no_draw():
    mixture = Mixture([3.0, 1.0, 1e-4], 1000)
    for source, share in enumerate((0.75, 0.25, 2.5e-5)):
        draws = [mixture.draws(source, window) for window in range(400)]
        assert np.concatenate(draws).tolist() == list(range(sum(map(len, draws))))
        expected = 1000 * share / 1.000025
        assert all(abs(len(d) - expected) < 1 for d in draws)
        assert abs(sum(map(len, draws)) - 400 * expected) < 1


def image_mix(count: int, text_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 512 x 512 with captions, and texts (log-normal, median 400) of a token share."""
    random = np.random.default_rng(seed)
    texts = np.clip(np.exp(random.normal(np.log(400), 1.2, count)), 8, None).astype(int)
    images = 4163 + random.integers(40, 90, count)
    odds = text_share / texts.mean(), (1 - text_share) / images.mean()
    is_text = random.random(count) < odds[0] / sum(odds)
    return np.where(is_text, texts, images), is_text


def fill(rows, room: int) -> float:
    return sum(piece.length for row in rows for piece in row) / (len(rows) * room)


@pytest.mark.parametrize(
    ("share", "whole", "cut"), [(0.5, 0.998, 0.998), (0.2, 0.895, 0.9965), (0.0, 0.82, 0.82)]
)
def test_rows_of_the_first_stage_are_as_full_as_the_mix_allows(share, whole, cut):
    """Context 5,120: a 512 x 512 image leaves about 890 tokens, which only texts can fill."""
    lengths, is_text = image_mix(4096, share, seed=0)
    assert fill(pack(lengths, is_text, 5120, 0), 5120) > whole
    rows = pack(lengths, is_text, 5120, 128)
    assert fill(rows, 5120) > cut
    # No packing has fewer rows than tokens or images need.
    least = max(-(-lengths.sum() // 5120), (~is_text).sum())
    assert len(rows) <= least * 1.004


def test_where_texts_are_too_few_for_every_image_there_is_a_row_for_each_image_alone():
    lengths, is_text = image_mix(4096, 0.1, seed=0)
    assert len(pack(lengths, is_text, 5120, 128)) == (~is_text).sum()


documents = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(documents, st.sampled_from([64, 100, 257]), st.sampled_from([0, 8, 32]))
def test_every_token_is_in_one_row_and_only_texts_are_cut(given_documents, room, smallest):
    lengths = np.array([length for length, _ in given_documents])
    is_text = np.array([text for _, text in given_documents])
    rows = pack(lengths, is_text, room, smallest)
    assert rows == pack(lengths, is_text, room, smallest)
    found: dict[int, list] = {}
    for row in rows:
        assert 0 < sum(piece.length for piece in row) <= room
        for piece in row:
            found.setdefault(piece.document, []).append(piece)
    for number, length in enumerate(lengths.tolist()):
        pieces = sorted(found.get(number, []))
        if length > room and not is_text[number]:
            assert pieces == []
            continue
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == length
        assert len(pieces) == 1 or is_text[number]
        if len(pieces) > 1:
            assert min(piece.length for piece in pieces) >= max(1, smallest)
