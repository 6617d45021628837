"""Images and video of a request: data URLs to pixels."""

import io
import tempfile
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from emu3.data.media import MediaError, open_video, read_image
from emu3.prompt import Clip
from emu3.serve.requests import ImagePart, VideoPart
from emu3.tools.look import resized
from emu3.tools.tokenize import encode_video
from emu3.vision import VisionTokenizer


@dataclass(frozen=True)
class Pixels:
    """An image ``[1, 3, H, W]``, or a clip ``[T, 3, H, W]`` with its frame rate, in [-1, 1]."""

    frames: Tensor
    fps: Fraction | None = None

    def shape(self, vision: VisionTokenizer) -> tuple[int, ...]:
        """Of its codes."""
        factor, span = vision.settings.spatial_factor, vision.settings.temporal_factor
        height, width = (side // factor for side in self.frames.shape[2:])
        num_frames = -(-len(self.frames) // span)  # the last is filled with its last one
        return (height, width) if self.fps is None else (num_frames, height, width)

    def part(self, codes: Tensor, vision: VisionTokenizer) -> Tensor | Clip:
        """``codes`` of it as a part of a prompt."""
        return codes if self.fps is None else Clip(codes, self.fps, vision.settings.temporal_factor)

    def encode(self, vision: VisionTokenizer) -> Tensor:
        frames = self.frames.to(vision.codebook.device)
        if self.fps is None:
            return vision.encode(frames)[0]
        return encode_video(vision, iter(frames), "pieces")


def read_media(
    parts: Sequence[ImagePart | VideoPart],
    vision: VisionTokenizer,
    *,
    size: int | None,
    fps: float | None,
    max_pixels: int,
    max_frames: int,
) -> list[Pixels]:
    """The pixels of data URLs.

    Args:
        parts: images and videos, in their order.
        vision: the vision tokenizer that is to encode them.
        size: side of the squares that images are resized to; None resizes as Emu3 does.
        fps: frames a second that are taken of a video; None takes all.
        max_pixels: of an image or a frame, before it is resized.
        max_frames: of a video.

    Raises:
        ValueError: one line, for a part that is none or is beyond a limit.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts, 1):
            is_video = isinstance(part, VideoPart)
            path = Path(folder, f"{'video' if is_video else 'image'} {number}")
            path.write_bytes(_data(part.video_url.url if is_video else part.image_url.url, path))
            try:
                if is_video:
                    found.append(_clip(path, vision, size, fps, max_pixels, max_frames))
                else:
                    _check_size(path, max_pixels)
                    found.append(Pixels(resized(read_image(path), size)[None]))
            except ValueError as error:
                raise ValueError(str(error).replace(f"{folder}/", "")) from None
    return found


def _data(url: str, path: Path) -> bytes:
    """The bytes of a data URL; another URL is not fetched."""
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ValueError(f"{path.name} must be a data URL in base64, got {url[:40]!r}")
    try:
        return b64decode(body, validate=True)
    except ValueError:
        raise ValueError(
            f"{path.name} must be a data URL in base64, got other characters"
        ) from None


def _check_size(path: Path, max_pixels: int) -> None:
    """By the header alone; what has none is for :func:`read_image` to tell."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            size = image.size
    except Exception:
        return
    _check_pixels(path, *size, max_pixels)


def _check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError(f"{path} may have {max_pixels} pixels, got {width} x {height}")


def _clip(
    path: Path,
    vision: VisionTokenizer,
    size: int | None,
    fps: float | None,
    max_pixels: int,
    max_frames: int,
) -> Pixels:
    if vision.settings.temporal_factor == 1:
        raise ValueError(f"{path} must be an image: the vision tokenizer takes no video")
    video = open_video(path, None if fps is None else Fraction(fps).limit_denominator(1000))
    _check_pixels(path, video.width, video.height, max_pixels)
    frames = [resized(frame, size) for frame in islice(video, max_frames + 1)]
    if len(frames) > max_frames:
        raise ValueError(f"{path} may have {max_frames} frames, got more: lower fps")
    return Pixels(torch.stack(frames), video.fps)
