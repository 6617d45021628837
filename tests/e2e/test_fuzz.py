"""Damaged files of every kind: some seconds of each here, minutes in make test-all."""

import pytest

from tests.e2e.fuzz import fuzz

SHORT = [("images", range(600)), ("videos", range(200))]
LONG = [("images", range(first, first + 14_700)) for first in range(600, 30_000, 14_700)]
LONG += [("videos", range(first, first + 975)) for first in range(200, 8000, 975)]


@pytest.mark.parametrize(
    ("kind", "numbers"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.e2e) for case in LONG)]
)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, numbers):
    assert fuzz(kind, numbers).faults == []
