"""Ranges, excuses and duplicates, on rows alone."""

import random

import numpy as np
import pytest

from emu3.settings import merge, parse
from emu3.tools.curate.decide import check_filters, decide, duplicates_of
from emu3.tools.curate.manifest import new_row
from emu3.tools.curate.settings import CurateSettings


def settings_of(**tree):
    base = CurateSettings().model_dump(exclude_none=True)
    return parse(CurateSettings, merge(base, tree))


def image(id_="a", hash_=0, **scores):
    size = {"width": 600, "height": 600, "short_edge": 600, "aspect": 1.0, "text": 0.0}
    return new_row(id=id_, kind="image", hash=f"{hash_:016x}", **(size | scores))


def decided(settings, *rows):
    decide(rows, settings)
    return [row["reasons"] for row in rows]


def test_a_row_is_dropped_for_every_score_out_of_its_range():
    small, wide = image(short_edge=300), image(short_edge=90, aspect=6.0)
    good = image(hash_=1 << 40)
    assert decided(settings_of(duplicates=-1), small, wide, good) == [
        ["short_edge 300 < 512"],
        ["short_edge 90 < 512", "aspect 6 > 5"],
        [],
    ]
    assert [row["keep"] for row in (small, wide, good)] == [False, False, True]


def test_a_low_score_is_excused_by_another():
    """Emu3's: images of low aesthetic score are kept if they have text."""
    ranges = {"aesthetic": {"min": 5.5, "unless": {"text": {"min": 0.1}}}}
    settings = settings_of(images=ranges, duplicates=-1)
    rows = image(aesthetic=5.0), image(aesthetic=5.0, text=0.2), image(aesthetic=6.0)
    assert decided(settings, *rows) == [["aesthetic 5 < 5.5"], [], []]


def test_a_score_that_is_not_measured_is_no_score_in_range():
    settings = settings_of(images={"aesthetic": {"min": 5.5}})
    assert decided(settings, image()) == [["aesthetic is not measured"]]


def test_the_ends_of_a_range_are_in_it():
    settings = settings_of(images={"aspect": {"min": 1.0, "max": 1.0}})
    assert decided(settings, image()) == [[]]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"images": {"beauty": {"min": 1}}}, r"images\.beauty: unknown score; there are width"),
        (
            {"videos": {"text": {"unless": {"x": {"min": 1}}}}},
            r"videos\.text\.unless\.x: unknown score",
        ),
        ({"images": {"text": {"min": 2, "max": 1}}}, r"min must be at most max \(1\), got 2"),
        ({"measure": {"fps": 2}}, r"measure\.fps: unknown setting"),
        ({"caption": {"max_cost": 1}}, "max_cost must come with price_in or price_out"),
        ({"duplicates": 16}, "duplicates"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tree, line):
    with pytest.raises(ValueError, match=line):
        check_filters(settings_of(**tree), ["aesthetic"])


def test_of_duplicates_the_largest_is_kept_and_names_the_others():
    one, large = image("one", 0b1111), image("large", 0b0111, width=900)
    other = image("other", 0xFFFF << 20)
    assert decided(settings_of(), one, large, other) == [["shows the same as large"], [], []]
    assert one["duplicate_of"] == "large"


def test_a_duplicate_of_what_is_dropped_is_kept():
    small, good = image("small", 5, short_edge=10), image("good", 5)
    assert decided(settings_of(), small, good) == [["short_edge 10 < 512"], []]


@pytest.mark.parametrize("most", [0, 1, 4, 9])
@pytest.mark.parametrize("words", [1, 3])
def test_duplicates_are_those_of_comparing_all_with_all(most, words):
    """Clusters of near and equal hashes, chains among them, which are not followed."""
    chosen = random.Random(most)
    hashes = []
    for _ in range(30):
        center = [chosen.getrandbits(64) for _ in range(words)]
        for _ in range(8):
            flips = [chosen.sample(range(64), most // 2 + 1) for _ in center]
            near = [w ^ sum(1 << b for b in bits) for w, bits in zip(center, flips, strict=True)]
            hashes += [near] * chosen.choice([1, 1, 2])
    chosen.shuffle(hashes)

    def apart(one, other):
        return max((a ^ b).bit_count() for a, b in zip(one, other, strict=True))

    expected, kept = {}, []
    for row, one in enumerate(hashes):
        better = next((k for k in kept if apart(hashes[k], one) <= most), None)
        if better is None:
            kept.append(row)
        else:
            expected[row] = better
    assert expected
    assert duplicates_of(np.array(hashes, np.uint64), most) == expected


def test_a_hundred_thousand_equal_rows_are_compared_once():
    """Black frames, say: their pairs would be five thousand million."""
    found = duplicates_of(np.zeros((100_000, 1), np.uint64), 4)
    assert len(found) == 99_999
    assert set(found.values()) == {0}
