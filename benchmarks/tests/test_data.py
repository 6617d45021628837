"""The path of the data, at tiny sizes."""

from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.suites import data


def test_the_command_prints_fill_opening_and_reading(monkeypatch):
    monkeypatch.setattr(data, "MIXES", data.MIXES[:2])
    words = ["data", "--documents", "1000", "--tokens", "100000", "--windows", "1"]
    shown = CliRunner().invoke(front.app, words)
    assert shown.exit_code == 0, shown.output
    for part in ("text 0.2", "1,000 documents", "opened in", "tokens/s", "MiB more of memory"):
        assert part in shown.output, part


def test_rows_are_as_full_as_stated():
    """The figures of docs/data.md, on fewer windows."""
    for (room, mix), least in zip(data.MIXES, LEAST, strict=True):
        way = (4096 if room < 10_000 else 16384, 128)
        assert data.fill(room, mix, 1, [way])[way].share >= least, mix


LEAST = [0.998, 0.9965, 0.9, 0.82, 0.998, 0.994, 0.995, 0.943, 0.952]
