"""Damaged files of every kind: some ten seconds of each here, minutes in make test-all."""

import pytest

from tests.e2e.fuzz import fuzz

LONG = pytest.mark.e2e, pytest.mark.timeout(1200)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("images", range(1500)),
        ("videos", range(400)),
        pytest.param("images", range(1500, 30_000), marks=LONG),
        pytest.param("videos", range(400, 8000), marks=LONG),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, numbers):
    assert fuzz(kind, numbers).faults == []
