"""Small videos whose frames tell their number, in every container, and of odd kinds."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image

from tests.media.odd_images import saved

HEIGHT, WIDTH = 48, 64
PACKET = 188
"""Bytes of a packet of a transport stream."""


def numbered(count: int, first: int = 0) -> list[np.ndarray]:
    """Grey frames ``[H, W, 3]``, each five levels brighter than the one before."""
    levels = range(20 + 5 * first, 20 + 5 * (first + count), 5)
    return [np.full((HEIGHT, WIDTH, 3), level, np.uint8) for level in levels]


def numbers(frames: Iterable[torch.Tensor]) -> list[int]:
    """The numbers of decoded frames of ``numbered``."""
    return [round((float(frame.float().mean()) - 20) / 5) for frame in frames]


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    *,
    start: int = 0,
    b_frames: int = 0,
    sound: bool = False,
    matrix: Iterable[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    **container,
) -> Path:
    """Write ``[H, W, 3]`` frames at 25 a second, the first at ``start`` / 25 seconds.

    Args:
        sound: a silent second stream.
        matrix: the nine numbers of a display matrix.
    """
    with av.open(path, "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options=_OPTIONS.get(codec, {}) | (options or {}))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pix_fmt
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 25)
        if matrix:
            stream.set_display_matrix(matrix)
        silence = file.add_stream("aac", rate=44100) if sound else None
        for number, rows in enumerate(frames, start):
            frame = av.VideoFrame.from_ndarray(rows, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if silence:
            mux_silence(file, silence)
    return path


_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "10", "g": "10"},
    "libx265": {"preset": "ultrafast", "crf": "10", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "10"},
    "mpeg2video": {"qmin": "1", "qmax": "2"},
    "mpeg1video": {"qmin": "1", "qmax": "2"},
    "mpeg4": {"qmin": "1", "qmax": "2"},
}


def mux_silence(file: av.container.OutputContainer, stream: av.AudioStream) -> None:
    for number in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate, frame.pts = 44100, 1024 * number
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def song_with_cover(path: Path, *, video: bool) -> Path:
    """Sound with a cover image, and behind them a video of three frames if asked for."""
    cover = np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    with av.open(path, "w", format="matroska" if path.suffix == ".mkv" else "mp4") as file:
        sound = file.add_stream("aac", rate=44100)
        if path.suffix == ".mkv":
            file.add_attachment("cover.jpg", "image/jpeg", saved(Image.fromarray(cover), "JPEG"))
        else:
            image = file.add_stream("mjpeg", rate=1)
            image.height, image.width, image.pix_fmt = *cover.shape[:2], "yuvj420p"
            image.disposition = Disposition.attached_pic
        film = file.add_stream("libx264", rate=25) if video else None
        if film:
            film.height, film.width, film.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        mux_silence(file, sound)
        if path.suffix != ".mkv":
            file.mux(image.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            file.mux(image.encode())
        for rows in numbered(3) if film else ():
            file.mux(film.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        if film:
            file.mux(film.encode())
    return path


def joined(first: bytes, second: bytes) -> bytes:
    """Two transport streams as one, undamaged: their packets' counters go on."""
    last: dict[int, int] = {}
    for at in range(0, len(first), PACKET):
        if first[at + 3] & 0x10:
            last[_pid(first, at)] = first[at + 3] & 15
    shift: dict[int, int] = {}
    whole = bytearray(first)
    for at in range(0, len(second), PACKET):
        packet, pid = bytearray(second[at : at + PACKET]), _pid(second, at)
        if pid in last:
            shift.setdefault(pid, (last[pid] + 1 - packet[3]) % 16)
            packet[3] = (packet[3] & 0xF0) | ((packet[3] + shift[pid]) & 15)
        whole += packet
    return bytes(whole)


def _pid(stream: bytes, at: int) -> int:
    return ((stream[at + 1] & 0x1F) << 8) | stream[at + 2]


def corpus(folder: Path) -> dict[str, bytes]:
    """Whole videos of ten frames of every container that is read, and of many codecs."""
    kinds = {
        "plain.mp4": {},
        "sound.mp4": {"sound": True, "movflags": "faststart"},
        "pieces.mp4": {"movflags": "frag_keyframe+empty_moov"},
        "turned.mov": {"matrix": (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)},
        "later.mkv": {"b_frames": 2, "start": 50},
        "sound.mkv": {"codec": "mpeg4", "sound": True},
        "hevc.mp4": {"codec": "libx265", "b_frames": 2},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "xvid.avi": {"codec": "mpeg4", "b_frames": 2},
        "h264.avi": {"b_frames": 2},
        "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
        "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2},
        "mpeg1.mpeg": {"codec": "mpeg1video"},
        "h264.ts": {"b_frames": 2, "sound": True},
        "mpeg2.ts": {"codec": "mpeg2video"},
        "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
        "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
        "mpeg4.m4v": {"codec": "mpeg4"},
    }
    return {
        name: encode(folder / name, numbered(10), **kind).read_bytes()
        for name, kind in kinds.items()
    }
