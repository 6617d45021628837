"""Digits as files for ``emu3 prepare``: images and clips beside JSON lines with their captions.

Only training digits are written. Colour and motion are those of the streams of ``emu3 demo``, drawn
once for each file.
"""

import json
from collections.abc import Iterable, Iterator
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import av
from torch import Tensor

from emu3.demo.config import ClipRecipe
from emu3.demo.digits import caption, render
from emu3.demo.moving_stream import sample_clips
from emu3.demo.stream import DigitStream, training_digits
from emu3.files import replacing
from emu3.vision.images import postprocess, to_levels

_AT_ONCE = 64
"""Images or clips in memory as pixels."""


def write_images(folder: Path, recipe: ClipRecipe, count: int) -> Path:
    """Write ``count`` PNG files, and ``images.jsonl`` with their captions, which is returned.

    Every digit comes about as often as another, each time moved and in a random colour.
    """
    return _write_lines(folder / "images.jsonl", _images(folder, recipe, count))


def write_clips(folder: Path, recipe: ClipRecipe, count: int) -> Path:
    """Write ``count`` MP4 files, and ``clips.jsonl`` with their captions, which is returned."""
    return _write_lines(folder / "clips.jsonl", _clips(folder, recipe, count))


def write_texts(folder: Path) -> Path:
    """Write ``texts.jsonl`` with :func:`descriptions`, and return it."""
    return _write_lines(folder / "texts.jsonl", ({"text": words} for words in descriptions()))


def descriptions() -> list[str]:
    """scikit-learn's descriptions of its data sets."""
    found = [path for path in files("sklearn.datasets.descr").iterdir() if path.suffix == ".rst"]
    return [path.read_text("utf-8") for path in sorted(found)]


def _images(folder: Path, recipe: ClipRecipe, count: int) -> Iterator[dict[str, str]]:
    (folder / "images").mkdir(parents=True)
    stream = _stream(recipe)
    for numbers in _batches(count):
        chosen, colors, motion = stream.choose(len(numbers))
        images = postprocess(render(chosen.scans, colors, motion, stream.size))
        for at, (number, image) in enumerate(zip(numbers, images, strict=True)):
            name = f"images/{number:06}.png"
            image.save(folder / name)
            yield {"image": name, "caption": caption(int(chosen.labels[at]), int(colors[at]))}


def _clips(folder: Path, recipe: ClipRecipe, count: int) -> Iterator[dict[str, str]]:
    (folder / "clips").mkdir(parents=True)
    stream = _stream(recipe)
    for numbers in _batches(count):
        clips, shown = sample_clips(stream, recipe, len(numbers))
        for at, (number, clip) in enumerate(zip(numbers, to_levels(clips), strict=True)):
            name = f"clips/{number:06}.mp4"
            _write_clip(folder / name, clip, recipe.clips.rate)
            yield {"video": name, "caption": shown.caption(at)}


def _write_clip(path: Path, frames: Tensor, fps: Fraction) -> None:
    """Write ``[T, 3, H, W]`` uint8 without loss: 4:2:0 would change 15 % of a small clip's codes.

    Nothing is flushed, which would take longer than all else.
    """
    with av.open(path, "w") as container:
        how = {"qp": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264rgb", rate=fps, options=how)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "rgb24"
        for rows in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        container.mux(stream.encode())


def _stream(recipe: ClipRecipe) -> DigitStream:
    digits = training_digits(recipe.data)
    return DigitStream(digits, recipe.data, recipe.vision.image_size, recipe.train.seed)


def _batches(count: int) -> Iterator[range]:
    return (range(at, min(at + _AT_ONCE, count)) for at in range(0, count, _AT_ONCE))


def _write_lines(path: Path, records: Iterable[dict[str, str]]) -> Path:
    """The lines appear when all files do."""
    with replacing(path) as draft, draft.open("w") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
    return path
