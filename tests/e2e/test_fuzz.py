"""Damaged files of every kind: some ten seconds of each here, minutes in make test-all."""

import pytest

from tests.e2e.fuzz import fuzz


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("images", range(1500)),
        ("videos", range(250)),
        pytest.param("images", range(1500, 15_000), marks=pytest.mark.e2e),
        pytest.param("videos", range(250, 2500), marks=pytest.mark.e2e),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, numbers):
    assert fuzz(kind, numbers).faults == []
