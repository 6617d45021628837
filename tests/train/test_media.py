"""Images and videos, from files and to files: what is read, what is refused, and how."""

import resource
import struct
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from emu3.data.media import open_video, read_image, write_image, write_video
from tests import children
from tests.train.clips import BIKES, clip

RED_OVER_BLUE = np.array([[[255, 0, 0]] * 3, [[0, 0, 255]] * 3], dtype=np.uint8)


def test_a_png_comes_back_bit_for_bit(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    write_image(tmp_path / "x.png", image)
    assert read_image(tmp_path / "x.png").equal(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_common_mode_becomes_rgb(mode, tmp_path):
    """Black beside white, which every mode can say."""
    grey = np.array([[0, 255]], dtype=np.uint8)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    (wide if mode == "I;16" else Image.fromarray(grey).convert(mode)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").equal(torch.from_numpy(grey).expand(3, 1, 2))


def test_16_bits_are_rounded_to_8(tmp_path):
    Image.fromarray(np.array([[128, 129, 65407]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_what_is_transparent_shows_white(mode, tmp_path):
    """The colour hidden under it must not come back."""
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.convert(mode).save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png")
    assert pixels[:, 0, 1].tolist() == [255, 255, 255]
    assert pixels[1:, 0, 0].max() < 60


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RED_OVER_BLUE).save(tmp_path / "x.png", exif=exif)
    turned = np.rot90(RED_OVER_BLUE, -1)
    assert read_image(tmp_path / "x.png").permute(1, 2, 0).tolist() == turned.tolist()


def test_a_telephone_s_image_of_two_is_its_first(tmp_path):
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "x.jpg").eq(255).all()


def png_of_no_width() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def tiff(array: np.ndarray, path) -> bytes:
    Image.fromarray(array).save(path, format="TIFF")
    return path.read_bytes()


def tiff_of_five_channels(path) -> bytes:
    """A TIFF's fifth channel: its tag 277, samples per pixel, says 5."""
    whole = tiff(RED_OVER_BLUE, path)
    at = whole.index(struct.pack("<HHI", 277, 3, 1)) + 8
    return whole[:at] + struct.pack("<H", 5) + whole[at + 2 :]


def damaged_dds(path) -> bytes:
    """Pillow lets out a NotImplementedError on the unknown compression at byte 84."""
    Image.fromarray(RED_OVER_BLUE).save(path, format="DDS")
    whole = path.read_bytes()
    return whole[:80] + struct.pack("<I4s", 4, b"????") + whole[88:]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("nothing", "is not an image, or has no pixels or unknown channels"),
        ("words", "is not an image, or has no pixels or unknown channels"),
        ("no width", "is not an image, or has no pixels or unknown channels"),
        ("cut", "cannot be read: "),
        ("float", "has pixels of mode F; expected RGB, RGBA"),
        ("five channels", "unknown channels"),
        ("another format", "is not an image, or has no pixels or unknown channels"),
        ("missing", "No such file"),
    ],
)
def test_a_bad_image_gives_one_line_that_names_it(kind, line, tmp_path):
    path = tmp_path / "x.png"
    photograph = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    write_image(tmp_path / "whole.png", photograph)
    whole = (tmp_path / "whole.png").read_bytes()
    damaged = {
        "nothing": lambda: b"",
        "words": lambda: b"words",
        "no width": png_of_no_width,
        "cut": lambda: whole[: len(whole) // 2],
        "float": lambda: tiff(np.zeros((4, 4), np.float32), path),
        "five channels": lambda: tiff_of_five_channels(path),
        "another format": lambda: damaged_dds(path),
    }
    if kind in damaged:
        path.write_bytes(damaged[kind]())
    with pytest.raises(ValueError, match=line) as fault:
        read_image(path)
    assert str(fault.value).startswith(f"image: {path} ")
    assert "\n" not in str(fault.value)


def test_every_frame_of_a_clip_is_read_in_order_and_again():
    video = open_video(BIKES)
    assert (video.width, video.height, video.fps) == (640, 272, 25)
    frames = list(video)
    assert len(frames) == 250
    with av.open(str(BIKES)) as container:
        exact = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for place in (0, 100, 249):
        assert frames[place].permute(1, 2, 0).numpy().tolist() == exact[place].tolist()
    assert next(iter(video)).equal(frames[0])


def test_a_long_video_takes_the_memory_of_a_few_frames():
    """250 frames of 522,240 bytes would be 130 MB."""
    tracemalloc.start()
    for frame in open_video(BIKES):
        assert frame.numel() == 522_240
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 522_240


@pytest.mark.parametrize(
    ("fps", "every"), [(25, range(250)), (5, range(0, 250, 5)), (50, np.arange(500) // 2)]
)
def test_resampling_shows_the_newest_frame_that_has_begun(fps, every):
    frames = list(open_video(BIKES))
    shown = list(open_video(BIKES, Fraction(fps)))
    assert len(shown) == len(every)
    assert all(one.equal(frames[place]) for one, place in zip(shown, every, strict=True))


def test_a_rate_that_does_not_divide_keeps_the_duration():
    """10 s at 30000/1001 frames a second: the 300 instants 0, 0.03337 … before 10 s."""
    assert sum(1 for _ in open_video(BIKES, Fraction(30000, 1001))) == 300


def test_a_video_comes_back_nearly(tmp_path):
    frames = clip(9, 48, 64)
    write_video(tmp_path / "x.mp4", iter(frames), Fraction(30000, 1001))
    video = open_video(tmp_path / "x.mp4")
    assert (video.height, video.width, video.fps) == (48, 64, Fraction(30000, 1001))
    again = list(video)
    assert len(again) == 9
    for one, other in zip(frames, again, strict=True):
        assert (one.float() - other.float()).abs().mean() < 3


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)])
def test_colours_survive_the_way_through_bt709(color, tmp_path):
    frame = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    write_video(tmp_path / "x.mp4", [frame], Fraction(25))
    (again,) = open_video(tmp_path / "x.mp4")
    assert (again.float() - frame.float()).abs().max() <= 3


def test_odd_sides_grow_by_their_edge(tmp_path):
    write_video(tmp_path / "x.mp4", clip(2, 33, 47), Fraction(25))
    video = open_video(tmp_path / "x.mp4")
    assert (video.height, video.width) == (34, 48)


def test_a_telephone_held_upright_is_turned(tmp_path):
    with av.open(tmp_path / "x.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        stream.set_display_rotation(90)
        rows = np.zeros((16, 32, 3), np.uint8)
        rows[:8, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        container.mux(stream.encode())
    video = open_video(tmp_path / "x.mp4")
    assert (video.height, video.width) == (32, 16)
    (frame,) = video
    assert frame[0, 28, 3] > 200, "the white corner turns counterclockwise, to the lower left"
    assert frame[0, 3, 3] < 50


def test_a_title_in_latin_1_keeps_no_video_from_being_read(tmp_path):
    path = tmp_path / "x.mp4"
    with av.open(path, "w") as container:
        container.metadata["title"] = "cafe_"
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        rows = np.zeros((16, 16, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"cafe_", b"caf\xe9_"))
    assert len(list(open_video(path))) == 1


def remux(path, since: int = 0, **options) -> None:
    """The frames of the real clip as they are, from a second on, in another container."""
    with av.open(BIKES) as source, av.open(path, "w", options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        source.seek(since * av.time_base)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("end.mp4", {}, "is not a video, or is truncated"),
        (
            "begin.mp4",
            {"movflags": "faststart"},
            r"is truncated: \d+ of its 250 frames are missing",
        ),
        ("pieces.mp4", {"movflags": "frag_keyframe+empty_moov"}, "is truncated: "),
        ("x.mkv", {}, r"is truncated: \d+ frames, \d\.\d of 10\.0 s"),
    ],
    ids=["index at the end", "index at the beginning", "fragments", "matroska"],
)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_video_is_named_whatever_its_container(name, options, line, share, tmp_path):
    path = tmp_path / name
    remux(path, **options)
    assert sum(1 for _ in open_video(path)) == 250
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=line) as fault:
        list(open_video(path))
    assert str(fault.value).startswith(f"video: {path} ")
    assert "\n" not in str(fault.value)


def test_a_truncated_avi_is_named(tmp_path):
    path = tmp_path / "x.avi"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in clip(100, 32, 48):
            rows = frame.permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        container.mux(stream.encode())
    assert sum(1 for _ in open_video(path)) == 100
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"is truncated: \d+ frames, \d\.\d of 4\.0 s|after \d+"):
        list(open_video(path))


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4", "x.ts"])
def test_what_was_cut_out_of_a_longer_file_is_whole(name, tmp_path):
    """It was once refused: its frames keep their times, and Matroska counts them from 0."""
    remux(tmp_path / name, since=4)
    assert sum(1 for _ in open_video(tmp_path / name)) == 174


def test_a_damaged_middle_is_reported(tmp_path):
    whole = bytearray(BIKES.read_bytes())
    whole[200_000:260_000] = bytes(60_000)
    (tmp_path / "x.mp4").write_bytes(whole)
    with pytest.raises(ValueError, match=r"(breaks off|is damaged) after \d+ frames"):
        list(open_video(tmp_path / "x.mp4"))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(tmp_path / "x.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="has no video stream"):
        open_video(tmp_path / "x.mp4")


def write_to_a_full_disk(folder: Path) -> list[str]:
    """Errors of a process whose files the kernel refuses to grow past 20 kB."""
    noise = torch.randint(256, (3, 256, 256), dtype=torch.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    errors = []
    for write in (
        lambda: write_image(folder / "x.png", noise),
        lambda: write_video(folder / "x.mp4", [noise] * 9, Fraction(25)),
    ):
        try:
            write()
        except OSError as error:
            errors.append(error.strerror)
    return errors


@pytest.mark.e2e
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    assert children.run(write_to_a_full_disk, tmp_path) == ["File too large"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_breaks_off_leaves_no_video(tmp_path):
    def frames():
        yield from clip(5, 16, 16)
        raise ValueError("source")

    with pytest.raises(ValueError, match="source"):
        write_video(tmp_path / "x.mp4", frames(), Fraction(25))
    with pytest.raises(ValueError, match="no frame to write"):
        write_video(tmp_path / "x.mp4", [], Fraction(25))
    assert list(tmp_path.iterdir()) == []
