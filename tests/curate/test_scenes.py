"""Cuts of real and composed videos, to the frame, and the clips between them."""

import pytest

from emu3.tools.curate.scenes import find_scenes
from emu3.tools.curate.settings import MeasureSettings
from tests.curate.making import black, moving, real_clip, still, texture, tinted, write_clip

HOW = MeasureSettings()


def starts(path, how=HOW) -> list[int]:
    return [clip.first for clip in find_scenes(path, how).clips]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bikes", [0, 30, 76, 137, 187, 242]), ("bigbuckbunny", [0]), ("carphone_pristine", [0])],
)
def test_the_cuts_of_real_clips_are_found_to_the_frame(name, expected):
    found = find_scenes(real_clip(name), HOW)
    assert [clip.first for clip in found.clips] == expected
    assert [c.stop for c in found.clips[:-1]] == expected[1:]
    for clip in found.clips:
        seconds = (clip.stop - clip.first) / found.fps
        assert clip.end - clip.begin == pytest.approx(float(seconds), abs=1e-5)


def test_composed_cuts_and_a_black_gap_are_found(tmp_path):
    """The detector of fades cuts the gap in its middle: its halves are dropped as black."""
    scenes = moving(1, 24), moving(2, 30), black(20), still(3, 24)
    path = write_clip(tmp_path / "a.mp4", *scenes)
    assert starts(path) == [0, 24, 54, 64, 74]


def test_a_fade_through_black_is_a_cut_in_its_middle(tmp_path):
    """The change from frame to frame is too small for a cut: its darkness tells."""

    def fading(seed, levels):
        frame = tinted(texture(seed), (1, 1, 1))
        return ((frame * level).astype("uint8") for level in levels)

    falling, rising = [1 - n / 23 for n in range(24)], [n / 23 for n in range(24)]
    path = write_clip(tmp_path / "a.mp4", fading(1, falling), fading(2, rising))
    (cut,) = starts(path)[1:]
    assert abs(cut - 24) <= 2
    only_content = HOW.model_copy(update={"fade_threshold": 0})
    assert starts(path, only_content) == [0]


def test_a_long_scene_becomes_equal_clips_of_ten_to_twenty_seconds(tmp_path):
    path = write_clip(tmp_path / "a.mp4", still(1, 90), fps=2)
    clips = find_scenes(path, HOW).clips
    assert [(c.begin, c.end) for c in clips] == [(0, 15), (15, 30), (30, 45)]
    assert [(c.first, c.stop) for c in clips] == [(0, 30), (30, 60), (60, 90)]


def test_a_scene_of_the_longest_length_is_one_clip(tmp_path):
    path = write_clip(tmp_path / "a.mp4", still(1, 40), fps=2)
    assert len(find_scenes(path, HOW).clips) == 1
