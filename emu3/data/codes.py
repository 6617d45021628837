"""Codes of images and videos on disk: one safetensors file each, with its provenance.

``codes`` is int16, ``[h, w]`` of an image and ``[t, h, w]`` of a video: two bytes per code,
exactly enough for Emu3's 32,768 codes. The metadata ``emu3_codes`` is a ``Header`` in JSON.
"""

import hashlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, PositiveInt, model_validator
from safetensors.torch import save
from torch import Tensor
from typing_extensions import Self

from emu3.config import Settings
from emu3.files import replacing
from emu3.vision import VisionTokenizer
from emu3.vision.images import MAX_PIXELS, MIN_PIXELS
from emu3.vision.quantizer import RUNNING_MEANS
from emu3.weights import read_tensors
from emu3.weights.files import read_settings

_KEY = "emu3_codes"
# FFmpeg counts frames per second in fractions of two such numbers.
_LARGEST = 2**31 - 1
# Buffers of training; codes and pixels do not depend on them.
_IGNORED = ("num_batches_tracked", *RUNNING_MEANS)


def _rate(fps: str) -> str:
    """In lowest terms: one rate has one spelling."""
    is_rate = re.fullmatch(r"\d+(\.\d+)?|\d+/0*[1-9]\d*", fps)
    rate = Fraction(fps) if is_rate else Fraction(0)
    if not 0 < rate.numerator <= _LARGEST or rate.denominator > _LARGEST:
        raise ValueError("must be frames per second, such as 12, 29.97 or 30000/1001")
    return str(rate)


Rate = Annotated[str, AfterValidator(_rate)]


class Making(Settings):
    """The settings, beside the tokenizer, that codes depend on."""

    min_pixels: PositiveInt = MIN_PIXELS
    max_pixels: PositiveInt = MAX_PIXELS
    fps: Rate | None = None
    """Frames per second, as "12", "29.97" or "30000/1001"; None takes every frame."""
    clips: Literal["pieces", "stream"] = "pieces"
    """Every 4 frames independently, as the official code does, or as one stream."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels ({self.max_pixels})")
        return self

    def of_images(self) -> "Making":
        """Without the settings of videos."""
        return Making(min_pixels=self.min_pixels, max_pixels=self.max_pixels)


class Header(Settings):
    """Provenance of a file of codes."""

    version: Literal[1] = 1
    source: str
    """Name of the image or video, below the folder that was tokenized."""
    height: PositiveInt
    width: PositiveInt
    resized: tuple[PositiveInt, PositiveInt]
    """Height and width of the encoded pixels."""
    frames: PositiveInt | None = None
    """Frames of a video, without padding; None for an image."""
    fps: Rate | None = None
    tokenizer: str
    """``fingerprint`` of the tokenizer."""
    making: Making

    @model_validator(mode="after")
    def _a_video_has_a_rate(self) -> Self:
        if (self.frames is None) != (self.fps is None):
            raise ValueError("frames and fps come together")
        return self


def fingerprint(tokenizer: VisionTokenizer) -> str:
    """A hash of 16 hexadecimal digits of all weights and their dtypes."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        if not name.endswith(_IGNORED):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_codes(path: Path, codes: Tensor, header: Header) -> None:
    """Write integer codes ``[h, w]`` or ``[t, h, w]``, each below 32,768."""
    if codes.min() < 0 or codes.max() > torch.iinfo(torch.int16).max:
        raise ValueError(f"codes: {path} stores codes of 16 bits, got {codes.max()}")
    tensors = {"codes": codes.to("cpu", torch.int16).contiguous()}
    with replacing(path) as draft:
        # Not save_file: it writes files that only the owner can read, and raises no OSError.
        draft.write_bytes(save(tensors, {_KEY: header.model_dump_json()}))


def load_codes(path: Path) -> tuple[Tensor, Header]:
    """The codes, as int64, and their header.

    Raises:
        ValueError: one line, if the file is damaged, of another kind or of another version.
    """
    header = load_header(path)
    codes = read_tensors(path)[0].get("codes")
    dims = 2 if header.frames is None else 3
    if codes is None or codes.dtype != torch.int16 or codes.ndim != dims or not codes.numel():
        found = "no codes" if codes is None else f"{codes.dtype} {tuple(codes.shape)}"
        raise ValueError(f"codes: {path} must hold int16 in {dims} dimensions, got {found}")
    return codes.long(), header


def load_header(path: Path) -> Header:
    """The header of a file of codes; the codes are not read."""
    try:
        header = read_settings(path, _KEY, Header)
    except ValueError as error:
        line = str(error)
        raise ValueError(line if str(path) in line else f"codes: {path}: {line}") from None
    if header is None:
        raise ValueError(f"codes: {path} is not a file of codes")
    return header
