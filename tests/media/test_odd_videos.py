"""Videos as people have them: each frame once and in order, the right way up, or one line."""

from fractions import Fraction

import av
import numpy as np
import pytest

from emu3.data import media
from emu3.data.media import open_video, write_video
from tests.media.odd_images import exif
from tests.media.odd_videos import (
    HEIGHT,
    PACKET,
    WIDTH,
    corpus,
    encode,
    joined,
    numbered,
    numbers,
    song_with_cover,
)
from tests.train.clips import clip


def shown(path, fps=None) -> list[int]:
    return numbers(open_video(path, None if fps is None else Fraction(fps)))


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("x.avi", "libx264", 2),
        ("x.avi", "libx264", 3),
        ("x.avi", "mpeg4", 2),
        ("x.avi", "mpeg2video", 2),
        ("x.mpg", "mpeg2video", 2),
        ("x.mpg", "libx264", 2),
        ("x.mpg", "mpeg1video", 2),
        ("x.ts", "mpeg2video", 2),
        ("x.ts", "libx264", 3),
        ("x.mkv", "mpeg2video", 2),
        ("x.mp4", "libx265", 2),
        ("x.mov", "mpeg4", 2),
    ],
)
def test_resampling_to_the_file_s_own_rate_changes_nothing(name, codec, b_frames, tmp_path):
    """AVI numbers frames in decoding order: 14 of 40 were lost and their neighbours doubled."""
    path = encode(tmp_path / name, numbered(40), codec, b_frames=b_frames)
    assert shown(path) == list(range(40))
    assert shown(path, 25) == list(range(40))
    assert shown(path, 5) == list(range(0, 40, 5))


def segment(folder, start: int, first: int) -> bytes:
    return encode(folder / "x.ts", numbered(20, first), start=start).read_bytes()


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, 20), (0, 0), (0, 25 * 3600), (25 * 3600, 0), (0, 10), (0, 25 * 11)],
    ids=["goes on", "restarts", "jumps an hour", "from late to 0", "half back", "11 s ahead"],
)
@pytest.mark.parametrize("fps", [None, 25, 5, 50])
def test_every_frame_comes_whatever_the_clock_of_a_stream_does(first, second, fps, tmp_path):
    """A clock that restarts lost the second part; an hour ahead gave 90,000 copies of a frame."""
    path = tmp_path / "x.ts"
    path.write_bytes(joined(segment(tmp_path, first, 0), segment(tmp_path, second, 20)))
    every = {None: range(40), 25: range(40), 5: range(0, 40, 5), 50: np.arange(80) // 2}
    assert shown(path, fps) == list(every[fps])
    assert open_video(path).fps == 25


def test_a_pause_of_a_transport_stream_is_kept(tmp_path):
    """Two seconds without a frame, as where the signal was lost, are shown as such."""
    (tmp_path / "x.ts").write_bytes(joined(segment(tmp_path, 0, 0), segment(tmp_path, 70, 20)))
    frames = shown(tmp_path / "x.ts", 25)
    assert frames == [*range(20), *[19] * 50, *range(20, 40)]


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_slide_show_keeps_its_long_frames(name, tmp_path):
    """A minute between frames is no jump where the container states each frame's time."""
    with av.open(tmp_path / name, "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number, rows in enumerate(numbered(4)):
            frame = av.VideoFrame.from_ndarray(rows, format="rgb24")
            frame.pts, frame.time_base = 25 * 60 * number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    frames = shown(tmp_path / name, 1)
    assert frames[: 3 * 60 + 1] == [0] * 60 + [1] * 60 + [2] * 60 + [3]


ONE, W = 1 << 16, 1 << 30
MATRICES = {
    "as it is": ((ONE, 0, 0, ONE), lambda rows: rows),
    "90 clockwise": ((0, ONE, -ONE, 0), lambda rows: np.rot90(rows, -1)),
    "180": ((-ONE, 0, 0, -ONE), lambda rows: np.rot90(rows, 2)),
    "270 clockwise": ((0, -ONE, ONE, 0), np.rot90),
    "mirrored": ((-ONE, 0, 0, ONE), np.fliplr),
    "upside down": ((ONE, 0, 0, -ONE), np.flipud),
    "transposed": ((0, ONE, ONE, 0), lambda rows: rows.swapaxes(0, 1)),
    "anti-transposed": ((0, -ONE, -ONE, 0), lambda rows: np.rot90(rows, 2).swapaxes(0, 1)),
    "half as large": ((0, ONE // 2, -ONE // 2, 0), lambda rows: np.rot90(rows, -1)),
    "a degree off": ((-65526, 1144, -1144, -65526), lambda rows: np.rot90(rows, 2)),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", ["x.mp4", "x.mov"])
def test_a_display_matrix_rotates_and_mirrors(name, kind, tmp_path):
    """The mirror was forgotten: a selfie's text was back to front."""
    rows = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rows[: HEIGHT // 2, : WIDTH // 2] = 80
    rows[: HEIGHT // 2, WIDTH // 2 :] = 160
    rows[HEIGHT // 2 :, : WIDTH // 2] = 240
    (a, b, c, d), upright = MATRICES[kind]
    matrix = (a, b, 0, c, d, 0, 0, 0, W)
    path = encode(tmp_path / name, [rows] * 3, matrix=matrix)
    video = open_video(path)
    exact = upright(rows)
    assert (video.height, video.width) == exact.shape[:2]
    for frame in video:
        assert np.abs(frame.permute(1, 2, 0).numpy().astype(int) - exact).mean() < 4


@pytest.mark.parametrize("name", ["x.mp4", "x.m4v", "x.mkv"])
def test_the_cover_of_a_song_is_no_video(name, tmp_path):
    """It gave codes of one frame at 90,000 a second, decoded to a video of 11 microseconds."""
    with pytest.raises(ValueError, match="has no video stream"):
        open_video(song_with_cover(tmp_path / name, video=False))


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_video_behind_its_cover_is_the_video(name, tmp_path):
    assert shown(song_with_cover(tmp_path / name, video=True)) == [0, 1, 2]


def test_a_damaged_transport_stream_costs_one_line_at_most(tmp_path):
    """A changed header byte ended the run by an IndexError out of PyAV."""
    whole = encode(tmp_path / "x.ts", numbered(12), b_frames=2).read_bytes()
    path, lines = tmp_path / "y.ts", []
    for at in range(0, len(whole), PACKET):
        for place, byte in ((1, 0x50), (2, 0x11), (1, 0x41)):
            damaged = bytearray(whole)
            damaged[at + place] = byte
            path.write_bytes(damaged)
            try:
                list(open_video(path))
            except ValueError as fault:
                lines.append(str(fault))
    assert lines
    assert all(line.startswith(f"video: {path} ") and "\n" not in line for line in lines)


def test_a_stream_found_while_reading_ends_nothing(tmp_path):
    """PyAV flushes all streams at the end, and raised IndexError for one that it had not known."""
    first = encode(tmp_path / "x.ts", numbered(20), b_frames=2).read_bytes()
    second = encode(tmp_path / "x.ts", numbered(20, 20), start=20, sound=True, b_frames=2)
    (tmp_path / "y.ts").write_bytes(joined(first, second.read_bytes()))
    assert shown(tmp_path / "y.ts") == list(range(40))


class Demuxer:
    """PyAV's, at the end of a file whose last stream was found while reading."""

    def demux(self):
        yield from "abc"
        raise IndexError("list index out of range")


def test_packets_end_where_the_demuxer_knows_no_more_streams():
    """Whether PyAV raises depends on memory that it does not own."""
    assert list(media._packets(Demuxer())) == ["a", "b", "c"]


def test_a_codec_that_is_not_known_is_told(tmp_path):
    whole = encode(tmp_path / "x.mkv", numbered(3)).read_bytes()
    (tmp_path / "x.mkv").write_bytes(whole.replace(b"V_MPEG4/ISO/AVC", b"V_UNKNOWN/CODEC"))
    with pytest.raises(ValueError, match="is of an unknown codec"):
        open_video(tmp_path / "x.mkv")


def test_frames_with_exif_data_are_read(tmp_path):
    """Cameras write Motion JPEG with EXIF data in every frame, a kind that PyAV cannot list."""
    path = encode(tmp_path / "x.avi", numbered(3), "mjpeg", pix_fmt="yuvj420p")
    with av.open(path) as source, av.open(tmp_path / "y.avi", "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is None:
                continue
            data, mark = bytes(packet), exif(orientation=6)
            data = data[:2] + b"\xff\xe1" + (len(mark) + 2).to_bytes(2, "big") + mark + data[2:]
            again = av.Packet(data)
            again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
            again.stream = stream
            copy.mux(again)
    video = open_video(tmp_path / "y.avi")
    assert numbers(video) == [0, 1, 2]
    assert (video.height, video.width) == (WIDTH, HEIGHT)


def test_the_whole_corpus_is_read(tmp_path):
    for name in corpus(tmp_path):
        for fps in (None, 25):
            assert shown(tmp_path / name, fps) == list(range(10)), (name, fps)


def test_a_written_video_is_resampled_frame_by_frame(tmp_path):
    write_video(tmp_path / "x.mp4", clip(30, 48, 64), Fraction(30000, 1001))
    frames = list(open_video(tmp_path / "x.mp4"))
    again = list(open_video(tmp_path / "x.mp4", Fraction(30000, 1001)))
    assert len(again) == 30
    assert all(one.equal(other) for one, other in zip(frames, again, strict=True))
