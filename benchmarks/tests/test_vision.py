"""The benchmark of the vision tokenizer: both do the same work, on miniatures."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import machine, report, run, vision
from benchmarks.contestants import Case
from benchmarks.test_ops import row
from tests.model.vision_parts import SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_encode_and_draw_the_same_picture(dtype):
    lineup = vision.lineup(SMALL, 64, dtype)
    assert list(lineup.calls) == [vision.OURS, vision.THEIRS]
    (codes, pixels), (their_codes, their_pixels) = (call() for call in lineup.calls.values())
    assert pixels.shape == (1, 3, 64, 64)
    assert their_pixels.shape == pixels.shape
    assert pixels.dtype == their_pixels.dtype == dtype
    assert codes.unique().numel() > codes.numel() // 4
    if dtype == torch.float32:
        assert codes.equal(their_codes)
        torch.testing.assert_close(pixels, their_pixels, rtol=1e-3, atol=1e-3)


def test_a_contestant_with_other_codes_is_not_timed(monkeypatch):
    right = vision.theirs
    monkeypatch.setattr(vision, "theirs", lambda *args: (right(*args)[0] + 1, right(*args)[1]))
    lineup = vision.lineup(SMALL, 64, torch.float32)
    assert set(lineup.calls) == {vision.OURS}
    assert "of its codes are ours" in lineup.missing[vision.THEIRS]


def test_a_row_stands_in_the_report_and_under_its_bars():
    lineup = vision.lineup(SMALL, 64, torch.float32)
    for call in lineup.calls.values():
        call()  # a long one is watched for its memory in the first round
    taken = {vision.OURS: [0.1, 0.1], vision.THEIRS: [0.8, 0.9]}
    case = Case("vision", vision.OURS, {"side": 32}, torch.float32, vision.DIRECTION)
    written = row(case, 2, [0.5, 0.5], lineup, taken, bound=None)
    assert "8.50x (8.00-9.00)" in report.section("vision", [written])
    kept = [line for line in report.bars([written]).splitlines() if "| vision |" in line]
    assert ["3.0x" in kept[0], "8.50x" in kept[0], "kept" in kept[0]] == [True] * 3
    assert "not measured" in kept[1]


def test_the_front_door_asks_for_one_run(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "time_all", lambda listed, allow_load: asked.extend(listed) or [])
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert CliRunner().invoke(front.app, ["vision", "--seconds", "3"]).exit_code == 0
    assert [(r.op, r.threads, r.seconds) for r in asked] == [("vision", (2,), 3.0)]
