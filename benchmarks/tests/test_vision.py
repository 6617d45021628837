"""The benchmark of the vision tokenizer: both do the same work, on miniatures."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, run
from benchmarks.harness.entries import Case
from benchmarks.harness.rows import row_of
from benchmarks.report import pages
from benchmarks.suites import vision
from emu3.config import VisionSettings

SMALL = VisionSettings(base_channels=32, num_codes=512)
"""Every part of Emu3's tokenizer at an eighth of its width."""


@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 64), (torch.bfloat16, 32)])
def test_both_reconstruct_the_same_image(dtype, side):
    entries = vision.entries_of(SMALL, side, dtype)
    assert list(entries.calls) == [vision.OURS, vision.THEIRS]
    (codes, pixels), (their_codes, their_pixels) = (call() for call in entries.calls.values())
    assert pixels.shape == (1, 3, side, side)
    assert their_pixels.shape == pixels.shape
    assert pixels.dtype == their_pixels.dtype == dtype
    assert codes.unique().numel() > codes.numel() // 4
    if dtype == torch.float32:
        assert codes.equal(their_codes)
        torch.testing.assert_close(pixels, their_pixels, rtol=1e-3, atol=1e-3)


def test_a_peer_with_other_codes_is_not_timed(monkeypatch):
    right = vision.theirs
    monkeypatch.setattr(vision, "theirs", lambda *args: (right(*args)[0] + 1, right(*args)[1]))
    entries = vision.entries_of(SMALL, 64, torch.float32)
    assert set(entries.calls) == {vision.OURS}
    assert "of its codes are ours" in entries.missing[vision.THEIRS]


def test_a_row_is_in_the_page_and_under_its_targets():
    entries = vision.entries_of(SMALL, 64, torch.float32)
    for call in entries.calls.values():
        call()  # the first call of a long entry measures its memory
    taken = {vision.OURS: [0.1, 0.1], vision.THEIRS: [0.8, 0.9]}
    case = Case("vision", vision.OURS, {"side": 32}, torch.float32, vision.DIRECTION)
    row = row_of(case, 2, [0.5, 0.5], entries, taken, bound=None)
    assert "8.50x (8.00-9.00)" in pages.section("vision", [row])
    listed = "".join(pages.targets([row])).splitlines()
    lines = [line for line in listed if "| vision |" in line]
    assert all(text in lines[0] for text in ("3.0x", "8.50x", "reached"))
    assert "not measured" in lines[1]


def test_the_command_times_one_run(monkeypatch):
    asked = []
    monkeypatch.setattr(
        run, "time_all", lambda listed, allow_load, show: asked.extend(listed) or []
    )
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert CliRunner().invoke(front.app, ["vision", "--seconds", "3"]).exit_code == 0
    assert [(r.op, r.threads, r.seconds) for r in asked] == [("vision", (2,), 3.0)]
