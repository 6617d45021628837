"""Host time: launches are counted and not made."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.suites import host
from emu3_kernels.ops import OPS

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(host, "SAMPLES", 1)
    monkeypatch.setattr(host, "SAMPLE_SECONDS", 0.0)


@pytest.mark.parametrize("op", OPS)
def test_every_op_with_a_triton_backend_has_a_row(op):
    rows = host.rows_of_op(op, torch.float32)
    for row in rows:
        assert row["launches"] >= 1 or (op, row["direction"]) == ("conv3x3", "backward")
        assert row["ms"] > 0
        assert ("empty_ms" in row) == (row["direction"] == "backward")
        assert (row["label"], row["suite"]) == ("MEASURED", "host")
    assert [row["direction"] for row in rows] in (
        [],
        ["forward"],
        ["forward", "forward, grad", "backward"],
    )


def test_the_command_prints_a_table():
    shown = CliRunner().invoke(front.app, ["host", "--op", "swiglu", "--dtype", "float32"])
    assert shown.exit_code == 0, shown.output
    assert "launches" in shown.output
