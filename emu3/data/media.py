"""Read and write images and videos.

An image or a frame is ``[3, H, W]`` uint8 RGB. A file that cannot be read raises a ``MediaError``
of one line that names it; a failed write raises an ``OSError``.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emu3.files import replacing
from emu3.vision.images import MODES, MODES_IN_WORDS, to_rgb

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})

# The formats of IMAGES, whatever a file's suffix. Pillow reads phones' MPO as JPEG.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each orientation of EXIF but the first does to an image."""
# Containers with a duration but without an index of all frames.
_STATE_LENGTH = ("matroska", "avi")
# Containers whose key frames are found by their time.
_INDEXED = ("mov", "matroska")
_NEAR = 1e-6
"""Seconds by which a span may differ from the start of a frame."""
_FAR = Fraction(10)
"""Seconds that a clock may step ahead in transport and program streams, as in FFmpeg."""


class MediaError(ValueError):
    """A file that is not an image or video, is damaged, or is of an unsupported kind."""


def read_image(path: Path) -> Tensor:
    """Read an image as ``[3, H, W]`` uint8.

    Rotated by its EXIF orientation. Grey and palettes become RGB, 16-bit grey is rounded to 8 bits,
    transparency becomes white; of an animation the first frame is read.

    Raises:
        MediaError: not an image, damaged, empty, or of unsupported channels.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_image(image, path)
            pixels = np.array(_upright(image))
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(
            f"image: {path} is not an image, or has no pixels or unknown channels"
        ) from None
    except Exception as error:
        raise MediaError(f"image: {path} cannot be read: {_reason(error)}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """``to_rgb``, rotated by the EXIF orientation; damaged EXIF data rotates nothing."""
    turn = None
    if image.format == "TIFF":
        # Pillow would rotate it while loading, and fail on damage in tags of no importance.
        turn = _turn(image)
        exif = image.getexif()
        for tag in list(exif):
            del exif[tag]
    pixels = to_rgb(image)
    # The EXIF data of a PNG may follow its pixels.
    turn = _turn(image) if turn is None else turn
    return pixels if turn is None else pixels.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def _reason(error: Exception) -> str:
    """What a library says of a file that it cannot read, in one line."""
    if isinstance(error, MemoryError):
        return "it is too large for the memory"
    told = OSError, SyntaxError, ValueError, av.FFmpegError, Image.DecompressionBombError
    text = getattr(error, "strerror", None) or (error if isinstance(error, told) else repr(error))
    return " ".join(str(text).split())


def _check_image(image: Image.Image, path: Path) -> None:
    if image.mode not in MODES:
        raise MediaError(
            f"image: {path} has pixels of mode {image.mode}; expected {MODES_IN_WORDS}"
        )


def write_image(path: Path, image: Tensor, about: Mapping[str, str] | None = None) -> None:
    """Write ``[3, H, W]`` uint8 as a PNG, atomically, with ``about`` as its text chunks."""
    texts = PngInfo()
    for name, words in (about or {}).items():
        texts.add_itxt(name, words)
    with replacing(path) as draft:
        Image.fromarray(_rows(image)).save(draft, format="PNG", pnginfo=texts)


def read_about(path: Path) -> dict[str, str]:
    """The text chunks of a PNG, or the metadata of a video.

    Raises:
        MediaError: neither, or damaged.
    """
    is_video = path.suffix.lower() in VIDEOS
    try:
        if is_video:
            with av.open(path, metadata_errors="replace") as container:
                return dict(container.metadata)
        with Image.open(path, formats=["PNG"]) as image:
            return {name: str(words) for name, words in image.text.items()}
    except Exception as error:
        kind = "video" if is_video else "image"
        raise MediaError(f"{kind}: {path} cannot be read: {_reason(error)}") from None


@dataclass(frozen=True)
class Video:
    """A video file; iterating decodes its frames from the start, a few in memory at a time.

    Frames are rotated by the file's metadata; pixels are assumed square.

    Raises:
        MediaError: while iterating, the file is truncated or its frames change size.
    """

    path: Path
    height: int
    width: int
    fps: Fraction
    """Frames per second that iterating yields."""
    resampled: bool
    """Whether ``fps`` is an argument, and not the file's own."""
    span: tuple[float, float] | None = None
    """Seconds that iterating yields the frames of, the last excluded; None is all."""

    def __iter__(self) -> Iterator[Tensor]:
        timed = decode(self.path, self.span)
        frames = _resample(timed, self.fps) if self.resampled else (frame for _, frame in timed)
        for number, frame in enumerate(frames):
            pixels = _to_tensor(self.path, frame)
            if pixels.shape[1:] != (self.height, self.width):
                raise MediaError(
                    f"video: {self.path} changes size: frame {number} is {pixels.shape[2]} x "
                    f"{pixels.shape[1]}, the first {self.width} x {self.height}"
                )
            yield pixels


def open_video(
    path: Path, fps: Fraction | None = None, span: tuple[float, float] | None = None
) -> Video:
    """Open a video file.

    Args:
        fps: frames per second to yield: at every instant the newest frame that has started.
            None yields every frame of the file once.
        span: seconds of the file to yield the frames of, the last excluded.

    Raises:
        MediaError: not a video, without a frame, or truncated.
    """
    try:
        _, first = next(decode(path, span))
        with av.open(path, metadata_errors="replace") as container:
            stream = _video_stream(path, container)
            rate = fps or stream.average_rate or stream.guessed_rate
    except StopIteration:
        where = f" in {span}" if span else ""
        raise MediaError(f"video: {path} has no frame{where}") from None
    if not rate or rate < 0:
        raise MediaError(f"video: {path} has no frame rate; set fps")
    _, height, width = _to_tensor(path, first).shape
    return Video(path, height, width, Fraction(rate), fps is not None, span)


def write_video(
    path: Path, frames: Iterable[Tensor], fps: Fraction, about: Mapping[str, str] | None = None
) -> None:
    """Write ``[3, H, W]`` uint8 frames as an MP4, atomically, with ``about`` as its metadata.

    Of ``about`` it keeps names that MP4 knows, such as ``title`` and ``comment``. H.264 at CRF 18
    in 4:2:0, BT.709. Odd sides are padded to even ones by repeating the edge.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"video: no frame to write to {path}")
    with (
        replacing(path) as draft,
        av.open(draft, "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        container.metadata.update(about or {})
        # With its AVX-512 code x264 does not repeat the bytes of frames of 8 x 8.
        how = {"crf": "18", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=how)
        stream.height, stream.width = (side + side % 2 for side in first.shape[1:])
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
        codec.color_range = ColorRange.MPEG
        for frame in chain((first,), frames):
            container.mux(stream.encode(_to_frame(frame)))
        container.mux(stream.encode())


def decode(
    path: Path, span: tuple[float, float] | None = None
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames of the first video stream that start in ``span``, each with its start in seconds.

    Starts rise. A file that is no video, damaged or truncated raises a ``MediaError``.
    """
    number, (first, last) = 0, span or (-math.inf, math.inf)
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = _video_stream(path, container)
            stream.thread_type = "AUTO"
            _check_index(path, stream)
            if span is not None and container.format.name.startswith(_INDEXED):
                container.seek(int(Fraction(first) / stream.time_base), stream=stream)
            clock = _Clock(container, stream)
            end = Fraction(0)
            for packet in _packets(container):
                end = max(end, _end(packet))
                for frame in packet.decode() if packet.stream is stream else ():
                    if packet.is_corrupt or frame.is_corrupt:
                        raise MediaError(f"video: {path} is damaged after {number} frames")
                    start = clock.start(frame)
                    if start >= last - _NEAR:
                        return
                    if start >= first - _NEAR:
                        yield start, frame
                    number += 1
            _check_end(path, container, end, number)
    except MediaError:
        raise
    except Exception as error:
        where = f"breaks off after {number} frames" if number else "is not a video, or is truncated"
        raise MediaError(f"video: {path} {where}: {_reason(error)}") from None


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The first video; the cover image of a song is none."""
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(f"video: {path} is of an unknown codec")
        return stream
    raise MediaError(f"video: {path} has no video stream")


def _packets(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Every packet, and then an empty one for each stream, to flush its decoder."""
    # PyAV flushes streams that were found while reading too, which it does not know.
    with suppress(IndexError):
        yield from container.demux()


def _check_index(path: Path, stream: av.VideoStream) -> None:
    """An MP4 that begins with its index shows at once whether it is truncated."""
    size = path.stat().st_size
    beyond = sum(entry.pos + entry.size > size for entry in stream.index_entries)
    if beyond:
        known = len(stream.index_entries)
        raise MediaError(f"video: {path} is truncated: {beyond} of its {known} frames are missing")


def _check_end(path: Path, container: av.container.InputContainer, end: Fraction, n: int) -> None:
    """Tolerates one second, for imprecise writers; a clip of a longer file keeps its times."""
    if not container.duration or not container.format.name.startswith(_STATE_LENGTH):
        return
    stated = Fraction(container.duration, av.time_base)
    reached = end - min(0, Fraction(container.start_time or 0, av.time_base))
    if reached + 1 < stated:
        raise MediaError(
            f"video: {path} is truncated: {n} frames, {float(reached):.1f} of {float(stated):.1f} s"
        )


def _end(packet: av.Packet) -> Fraction:
    if packet.pts is None:
        return Fraction(0)
    return (packet.pts + (packet.duration or 0)) * packet.time_base


class _Clock:
    """Starts of frames in seconds.

    A step back, or far ahead where clocks may jump, is a cut; a frame then starts at the end of
    the one before.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        stated = Fraction(container.duration or 0, av.time_base)
        may_jump = container.format.flags & av.format.Flags.ts_discont.value
        self.far = _FAR if may_jump else max(_FAR, stated)
        # AVI states times in decoding order alone.
        self.times = "dts" if container.format.name == "avi" else "pts"
        self.length = 1 / Fraction(stream.average_rate or 1)
        self.last: Fraction | None = None

    def start(self, frame: av.VideoFrame) -> Fraction:
        ticks = getattr(frame, self.times)
        stated = None if ticks is None else ticks * frame.time_base
        if self.last is None:
            start = stated or Fraction(0)
        elif stated is not None and 0 < stated - self.last <= self.far:
            start = stated
        else:
            start = self.last + self.length
        self.last = start
        self.length = frame.duration * frame.time_base or self.length
        return start


def _resample(
    timed: Iterator[tuple[Fraction, av.VideoFrame]], fps: Fraction
) -> Iterator[av.VideoFrame]:
    """The frame shown at 0, 1/fps, 2/fps …; the last frame lasts as long as the one before."""
    begin, shown = next(timed)
    due, started, last = 0, begin, 1 / fps
    for time, frame in timed:
        while begin + due / fps < time:
            yield shown
            due += 1
        last, started, shown = time - started, time, frame
    while begin + due / fps < started + last:
        yield shown
        due += 1


def _to_tensor(path: Path, frame: av.VideoFrame) -> Tensor:
    try:
        rows = upright_rows(frame)
    except Exception as error:
        raise MediaError(f"video: {path} cannot be converted to RGB: {_reason(error)}") from None
    return torch.from_numpy(np.ascontiguousarray(rows)).permute(2, 0, 1)


def upright_rows(frame: av.VideoFrame) -> np.ndarray:
    """RGB ``[H, W, 3]``, rotated and mirrored as the file's display matrix states."""
    # Threads would be started for every frame.
    rows = frame.to_ndarray(format="rgb24", threads=1)
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:
        # PyAV lists no side data beside a kind that is new to it, such as EXIF in Motion JPEG.
        return np.rot90(rows, round(frame.rotation / 90))
    if matrix is None:
        return rows
    # Pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) > abs(a):
        rows, a, d = rows.swapaxes(0, 1), c, b
    return rows[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _to_frame(image: Tensor) -> av.VideoFrame:
    rows = _rows(image)
    height, width, _ = rows.shape
    even = np.pad(rows, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


def _rows(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
