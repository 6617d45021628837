"""A span of a video: the frames that start in it, found by key frames where there is an index."""

from fractions import Fraction

import av
import pytest
import torch

from emu3.data.media import MediaError, decode, open_video
from tests.curate.making import moving


def write(path, frames=60, gop=10, b_frames=2):
    with av.open(path, "w") as container:
        options = {"g": str(gop), "bf": str(b_frames)}
        codec = "mpeg4" if path.suffix == ".avi" else "libx264"
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for rows in moving(1, frames):
            frame = av.VideoFrame.from_ndarray(rows, format="rgb24")
            container.mux(stream.encode(frame.reformat(64, 48, "yuv420p")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_a_span_has_the_frames_of_the_whole_that_start_in_it(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}")
    starts = [start for start, _ in decode(path)]
    whole = list(open_video(path))
    for first, stop in ((0, 60), (0, 1), (7, 23), (10, 20), (31, 32), (59, 60)):
        ends = [*starts, starts[-1] + 1]
        span = tuple(round(float(ends[at]), 6) for at in (first, stop))
        found = list(open_video(path, span=span))
        assert len(found) == stop - first
        assert torch.equal(torch.stack(found), torch.stack(whole[first:stop]))


def test_a_span_far_in_a_file_with_an_index_does_not_decode_what_is_before_it(tmp_path):
    """A file that is cut into hundreds of clips would be decoded hundreds of times."""
    path = write(tmp_path / "a.mp4")
    damaged = bytearray(path.read_bytes())
    with av.open(path) as container:
        first = next(container.demux(video=0))
        damaged[first.pos : first.pos + first.size] = bytes(first.size)
    path.write_bytes(damaged)
    with pytest.raises(MediaError):
        list(open_video(path))
    assert len(list(open_video(path, span=(1.25, 2.0)))) == 18


def test_a_span_is_resampled_from_its_own_start(tmp_path):
    path = write(tmp_path / "a.mp4")
    found = list(open_video(path, Fraction(12), (0.5, 1.5)))
    whole = list(open_video(path))
    assert torch.equal(torch.stack(found), torch.stack(whole[12:36:2]))


def test_a_span_without_a_frame_is_told(tmp_path):
    path = write(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"a\.mp4 has no frame in \(9, 10\)"):
        open_video(path, span=(9, 10))
