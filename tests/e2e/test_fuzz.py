"""Damaged files of every kind: some ten seconds of each here, minutes in make test-all."""

import pytest

from tests.e2e.fuzz import fuzz

SHORT = [("images", range(1500)), ("videos", range(400))]
LONG = [("images", range(first, first + 14_250)) for first in range(1500, 30_000, 14_250)]
LONG += [("videos", range(first, first + 950)) for first in range(400, 8000, 950)]


@pytest.mark.parametrize(
    ("kind", "numbers"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.e2e) for case in LONG)]
)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, numbers):
    assert fuzz(kind, numbers).faults == []
