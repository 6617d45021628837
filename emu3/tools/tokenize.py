"""Pictures and videos to files of codes, and back: the work of ``emu3 tokenize | detokenize``.

A file of codes is named as its source, with ``.safetensors`` behind it: ``a/b.jpg`` becomes
``a/b.jpg.safetensors``, and back ``a/b.jpg.png``; a video comes back as ``.mp4``. So no two
sources share a name. Every file is there whole or not at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

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
from emu3.tools.bulk import Item, Outcome, Tell, each, find
from emu3.vision import (
    VisionTokenizer,
    decode_pieces,
    decode_stream,
    encode_pieces,
    encode_stream,
    postprocess,
    preprocess,
)

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
    """Encode every picture and video among ``inputs`` into the folder ``out``.

    A file that has its codes is left out; so a run that was stopped goes on.

    Args:
        compare: folder for original and reconstruction side by side, with PSNR and SSIM.
        overwrite: encode again what is there.

    Raises:
        ValueError: codes in ``out`` are of another tokenizer or made in another way.
    """
    if compare and any(compare.resolve().is_relative_to(given.resolve()) for given in inputs):
        raise ValueError(f"{compare}: must not lie in a folder that is tokenized")
    run = _Tokenize(out, tokenizer, making, fingerprint(tokenizer), compare)
    items = find(inputs, IMAGES | VIDEOS)
    return each(items, run.read, run.work, lambda item: not overwrite and run.is_done(item))


def detokenize(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: VisionTokenizer,
    *,
    original_size: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Decode every file of codes among ``inputs`` into a PNG or MP4 in the folder ``out``.

    A file that is there and newer than its codes is left out.

    Args:
        original_size: resize (bicubic) to the size of the source; otherwise as it was encoded.
        overwrite: decode again what is there.
    """
    run = _Detokenize(out, tokenizer, fingerprint(tokenizer), original_size)
    items = find(inputs, [".safetensors"])
    return each(items, run.read, run.work, lambda item: not overwrite and run.is_done(item))


@dataclass(frozen=True)
class _Tokenize:
    out: Path
    tokenizer: VisionTokenizer
    making: Making
    mark: str
    compare: Path | None

    def is_done(self, item: Item) -> bool:
        path = self._codes_of(item)
        figures = self.compare and Path(f"{self.compare / item.name}.json")
        if not path.exists() or (figures and not figures.exists()):
            return False
        header = load_header(path)
        making = self.making if _is_video(item) else self.making.of_pictures()
        if header.tokenizer != self.mark:
            raise ValueError(f"{path} is of another tokenizer: choose another folder or overwrite")
        if header.making != making:
            raise ValueError(f"{path} was made otherwise: choose another folder or overwrite")
        return True

    def read(self, item: Item) -> Video | tuple[torch.Size, Tensor]:
        """A video, whose frames are read when they are due, or a picture's size and its pixels."""
        if _is_video(item):
            return open_video(item.source, Fraction(self.making.fps) if self.making.fps else None)
        image = read_image(item.source)
        return image.shape[1:], self._pixels(image)

    def work(self, item: Item, given: Video | tuple[torch.Size, Tensor], tell: Tell) -> None:
        if isinstance(given, Video):
            self._video(item, given, tell)
        else:
            self._picture(item, *given)

    def _picture(self, item: Item, size: torch.Size, pixels: Tensor) -> None:
        codes = self.tokenizer.encode(self._on_device(pixels[None]))[0]
        header = self._header(item, size, codes, making=self.making.of_pictures())
        self._finish(item, [pixels], codes, header)

    def _video(self, item: Item, video: Video, tell: Tell) -> None:
        making = self.making
        num_frames = 0

        def frames() -> Iterator[Tensor]:
            nonlocal num_frames
            for frame in video:
                num_frames += 1
                tell(f"frame {num_frames}")
                yield self._pixels(frame)

        clips = map(self._on_device, _clips(frames(), self.tokenizer.settings.temporal_factor))
        codes = torch.cat([part[0] for part in _ENCODE[making.clips](self.tokenizer, clips)])
        size = video.height, video.width
        header = self._header(
            item, size, codes, making=making, frames=num_frames, fps=str(video.fps)
        )
        self._finish(item, map(self._pixels, video), codes, header)

    def _header(self, item: Item, size: tuple[int, int], codes: Tensor, **more) -> Header:
        side = self.tokenizer.settings.spatial_factor
        return Header(
            source=item.name.as_posix(),
            height=size[0],
            width=size[1],
            resized=tuple(side * places for places in codes.shape[-2:]),
            tokenizer=self.mark,
            **more,
        )

    def _finish(self, item: Item, pixels: Iterable[Tensor], codes: Tensor, header: Header) -> None:
        """The codes come last: where they are, all the rest is there."""
        if self.compare:
            # Here, because torchmetrics is slow to import.
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
    mark: str
    original_size: bool

    def is_done(self, item: Item) -> bool:
        made = [Path(f"{self._source(item)}{suffix}") for suffix in (".png", ".mp4")]
        since = item.source.stat().st_mtime
        return any(path.exists() and path.stat().st_mtime >= since for path in made)

    def read(self, item: Item) -> tuple[Tensor, Header]:
        codes, header = load_codes(item.source)
        if header.tokenizer != self.mark:
            raise ValueError(f"codes: {item.source} is of another tokenizer")
        return codes, header

    def work(self, item: Item, given: tuple[Tensor, Header], tell: Tell) -> None:
        codes, header = given
        size = (header.height, header.width) if self.original_size else header.resized
        source = self._source(item)

        def images() -> Iterator[Tensor]:
            for number, pixels in enumerate(_decode(self.tokenizer, codes, header), 1):
                tell(f"frame {number} of {header.frames or 1}")
                yield _image(pixels, size)

        if header.fps is None:
            write_image(Path(f"{source}.png"), next(images()))
        else:
            write_video(Path(f"{source}.mp4"), images(), Fraction(header.fps))

    def _source(self, item: Item) -> Path:
        return self.out / item.name.with_suffix("")


def _is_video(item: Item) -> bool:
    return item.source.suffix.lower() in VIDEOS


def _clips(frames: Iterator[Tensor], length: int) -> Iterator[Tensor]:
    """``[1, length, 3, H, W]`` each; the last is filled up with its last frame."""
    while clip := list(islice(frames, length)):
        yield torch.stack(clip + [clip[-1]] * (length - len(clip)))[None]


def _decode(tokenizer: VisionTokenizer, codes: Tensor, header: Header) -> Iterator[Tensor]:
    """Pixels ``[3, H, W]`` of the picture, or of every frame of the video."""
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
    (picture,) = postprocess(pixels[None])
    if size is not None and size != (picture.height, picture.width):
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
