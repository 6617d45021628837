"""Images and videos to files of codes, and back: ``emu3 tokenize`` and ``emu3 detokenize``.

A file of codes has its source's name and ``.safetensors``: ``a/b.jpg`` becomes
``a/b.jpg.safetensors``, decoded ``a/b.jpg.png``; a decoded video is ``.mp4``. So no two sources
share a name. Every file is written atomically.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emu3.data.codes import Header, Making, fingerprint, load_codes, load_header, save_codes
from emu3.data.media import (
    IMAGES,
    VIDEOS,
    Video,
    open_video,
    read_image,
    write_image,
    write_video,
)
from emu3.tools.bulk import Found, Item, Outcome, Report, each, find, from_input
from emu3.vision import (
    VisionTokenizer,
    decode_pieces,
    decode_stream,
    encode_pieces,
    encode_stream,
    postprocess,
    preprocess,
)
from emu3.vision.tokenizer import PIXELS_AT_ONCE

_ENCODE = {"pieces": encode_pieces, "stream": encode_stream}
_DECODE = {"pieces": decode_pieces, "stream": decode_stream}


def tokenize(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: VisionTokenizer,
    making: Making,
    *,
    compare: Path | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Encode every image and video among ``inputs`` into the folder ``out``.

    Files that have their codes are skipped, so a stopped run can be continued.

    Args:
        compare: folder for original and reconstruction side by side, with PSNR and SSIM.
        overwrite: encode files that have their codes again.

    Raises:
        ValueError: codes in ``out`` are of another tokenizer or of other settings.
    """
    if compare and any(compare.resolve().is_relative_to(given.resolve()) for given in inputs):
        raise ValueError(f"{compare}: must not be in a folder that is tokenized")
    run = _Tokenize(out, tokenizer, making, fingerprint(tokenizer), compare)
    found = find(inputs, IMAGES | VIDEOS)
    return _run(found, run, overwrite)


def detokenize(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: VisionTokenizer,
    *,
    original_size: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Decode every file of codes among ``inputs`` into a PNG or MP4 in the folder ``out``.

    A decoded file newer than its codes is skipped.

    Args:
        original_size: resize (bicubic) to the size of the source; otherwise the encoded size.
        overwrite: decode existing files again.
    """
    run = _Detokenize(out, tokenizer, fingerprint(tokenizer), original_size)
    found = find(inputs, [".safetensors"])
    return _run(found, run, overwrite)


def _run(found: Found, run: "_Tokenize | _Detokenize", overwrite: bool) -> Outcome:
    def is_done(item: Item) -> bool:
        return not overwrite and run.is_done(item)

    outcome = each(found.items, run.read, run.work, is_done)
    return replace(outcome, passed_over=found.passed_over)


@dataclass(frozen=True)
class _Tokenize:
    out: Path
    tokenizer: VisionTokenizer
    making: Making
    fingerprint: str
    compare: Path | None

    def is_done(self, item: Item) -> bool:
        path = self._codes_of(item)
        metrics = self.compare and Path(f"{self.compare / item.name}.json")
        # os.path: a name that is too long does not exist.
        if not os.path.exists(path) or (metrics and not os.path.exists(metrics)):
            return False
        header = load_header(path)
        making = self.making if _is_video(item) else self.making.of_images()
        if header.tokenizer != self.fingerprint:
            raise ValueError(f"{path} is of another tokenizer: choose another folder or overwrite")
        if header.making != making:
            raise ValueError(
                f"{path} was made with other settings: choose another folder or overwrite"
            )
        return True

    def read(self, item: Item) -> Video | tuple[torch.Size, Tensor]:
        """A video, whose frames are read lazily, or an image's size and its pixels."""
        if _is_video(item):
            return open_video(item.source, Fraction(self.making.fps) if self.making.fps else None)
        image = read_image(item.source)
        return image.shape[1:], self._pixels(image)

    def work(self, item: Item, given: Video | tuple[torch.Size, Tensor], report: Report) -> None:
        if isinstance(given, Video):
            self._encode_video(item, given, report)
        else:
            self._encode_image(item, *given)

    def _encode_image(self, item: Item, size: torch.Size, pixels: Tensor) -> None:
        codes = self.tokenizer.encode(self._on_device(pixels[None]))[0]
        header = self._header(item, size, codes, making=self.making.of_images())
        self._finish(item, [pixels], codes, header)

    def _encode_video(self, item: Item, video: Video, report: Report) -> None:
        making = self.making
        num_frames = 0

        def frames() -> Iterator[Tensor]:
            nonlocal num_frames
            for frame in from_input(video):
                num_frames += 1
                report(f"frame {num_frames}")
                yield self._pixels(frame)

        codes = encode_video(self.tokenizer, map(self._on_device, frames()), making.clips)
        size = video.height, video.width
        header = self._header(
            item, size, codes, making=making, frames=num_frames, fps=str(video.fps)
        )
        self._finish(item, map(self._pixels, from_input(video)), codes, header)

    def _header(self, item: Item, size: tuple[int, int], codes: Tensor, **more) -> Header:
        side = self.tokenizer.settings.spatial_factor
        return Header(
            source=item.name.as_posix(),
            height=size[0],
            width=size[1],
            resized=tuple(side * size for size in codes.shape[-2:]),
            tokenizer=self.fingerprint,
            **more,
        )

    def _finish(self, item: Item, pixels: Iterable[Tensor], codes: Tensor, header: Header) -> None:
        """The codes are written last: if they exist, so does the comparison."""
        if self.compare:
            # Imported here: torchmetrics is slow to import.
            from emu3.tools.compare import compare

            pairs = zip(pixels, _decode(self.tokenizer, codes, header), strict=True)
            images = ((_image(one), _image(other)) for one, other in pairs)
            compare(self.compare / item.name, images, header)
        save_codes(self._codes_of(item), codes, header)

    def _codes_of(self, item: Item) -> Path:
        return Path(f"{self.out / item.name}.safetensors")

    def _pixels(self, image: Tensor) -> Tensor:
        how = self.making
        rows = image.permute(1, 2, 0)
        return preprocess(rows, min_pixels=how.min_pixels, max_pixels=how.max_pixels)

    def _on_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.tokenizer.codebook.device)


@dataclass(frozen=True)
class _Detokenize:
    out: Path
    tokenizer: VisionTokenizer
    fingerprint: str
    original_size: bool

    def is_done(self, item: Item) -> bool:
        if not item.source.exists():
            return False
        made = [Path(f"{self._source(item)}{suffix}") for suffix in (".png", ".mp4")]
        since = item.source.stat().st_mtime
        return any(path.exists() and path.stat().st_mtime >= since for path in made)

    def read(self, item: Item) -> tuple[Tensor, Header]:
        codes, header = load_codes(item.source)
        if header.tokenizer != self.fingerprint:
            raise ValueError(f"codes: {item.source} is of another tokenizer")
        return codes, header

    def work(self, item: Item, given: tuple[Tensor, Header], report: Report) -> None:
        codes, header = given
        size = (header.height, header.width) if self.original_size else header.resized
        source = self._source(item)

        def images() -> Iterator[Tensor]:
            for number, pixels in enumerate(_decode(self.tokenizer, codes, header), 1):
                report(f"frame {number} of {header.frames or 1}")
                yield _image(pixels, size)

        if header.fps is None:
            write_image(Path(f"{source}.png"), next(images()))
        else:
            write_video(Path(f"{source}.mp4"), images(), Fraction(header.fps))

    def _source(self, item: Item) -> Path:
        return self.out / item.name.with_suffix("")


def encode_video(
    tokenizer: VisionTokenizer, frames: Iterator[Tensor], clips: Literal["pieces", "stream"]
) -> Tensor:
    """Codes ``[t, h, w]`` of frames ``[3, H, W]`` in [-1, 1]; the last clip repeats its last."""
    parts = _ENCODE[clips](tokenizer, _in_clips(frames, tokenizer.settings.temporal_factor))
    return torch.cat([part[0] for part in parts])


def _is_video(item: Item) -> bool:
    return item.source.suffix.lower() in VIDEOS


def _in_clips(frames: Iterator[Tensor], span: int) -> Iterator[Tensor]:
    """Frames ``[3, H, W]`` as ``[1, T, 3, H, W]``, T a multiple of ``span``.

    As many frames come together as fit the caches; the last clip is padded with its last frame.
    """
    for first in frames:
        together = max(1, PIXELS_AT_ONCE // (span * first[0].numel()))
        clip = [first, *islice(frames, span * together - 1)]
        yield torch.stack(clip + clip[-1:] * (-len(clip) % span))[None]


def _decode(tokenizer: VisionTokenizer, codes: Tensor, header: Header) -> Iterator[Tensor]:
    """Pixels ``[3, H, W]`` of the image, or of every frame of the video."""
    codes = codes.to(tokenizer.codebook.device)
    if header.frames is None:
        yield tokenizer.decode(codes[None])[0]
        return
    most = len(codes) * tokenizer.settings.temporal_factor
    if not most - tokenizer.settings.temporal_factor < header.frames <= most:
        raise ValueError(f"codes: {len(codes)} frames of codes are not {header.frames} of pixels")
    parts = codes[None].split(1, dim=1)
    clips = _DECODE[header.making.clips](tokenizer, parts)
    yield from islice((frame for clip in clips for frame in clip[0]), header.frames)


def _image(pixels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """``[3, H, W]`` uint8 of pixels in [-1, 1], resized to ``size``."""
    (image,) = postprocess(pixels[None])
    if size is not None and size != (image.height, image.width):
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
