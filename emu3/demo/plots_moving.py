"""The PNG and GIF files of clips."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from emu3.demo.digits import BACKGROUND
from emu3.demo.plots import FAINT, WORDS, new_page, write_page
from emu3.files import replacing
from emu3.vision.images import to_levels

_GIVEN, _OTHER = (255, 179, 71), tuple(int(FAINT[i : i + 2], 16) for i in (1, 3, 5))
"""Colours of the outlines of given frames, and of the others."""
_ENLARGED, _OUTLINE, _GAP = 2, 3, 4
_COLUMNS = 6


def draw_frames(path: Path, clips: Tensor, captions: Sequence[str], title: str, given: int) -> None:
    """One row per clip ``[n, T, 3, H, W]`` beside its caption; ``given`` frames are outlined."""
    figure = new_page(12.0, (12.0 / clips.shape[1] + 0.25) * len(clips) + 0.8, title)
    axes = figure.subplots(len(clips), 1, squeeze=False)[:, 0]
    for axis, clip, caption in zip(axes, clips, captions, strict=True):
        frames = [_framed(frame, outlined=n < given) for n, frame in enumerate(clip)]
        _bare(axis)
        axis.imshow(torch.cat(frames, dim=1).numpy())
        axis.set_title(caption, color=WORDS, loc="left", fontsize=10, pad=3)
    write_page(figure, path)


def draw_film(
    path: Path, clips: Tensor, captions: Sequence[str], given: Sequence[int], fps: Fraction
) -> None:
    """A GIF of clips ``[n, T, 3, H, W]`` under their captions; given frames are outlined."""
    rows = -(-len(clips) // _COLUMNS)
    figure = new_page(7.2, 1.5 * rows, "")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis in axes:
        _bare(axis)
    shown = []
    for axis, clip, caption in zip(axes, clips, captions, strict=False):
        axis.set_title(caption.replace(" moves", "\nmoves"), color=WORDS, fontsize=8, pad=3)
        shown.append(axis.imshow(_framed(clip[0], outlined=False).numpy()))
    pages = []
    for number in range(clips.shape[1]):
        for image, clip, known in zip(shown, clips, given, strict=True):
            image.set_data(_framed(clip[number], outlined=number < known).numpy())
        pages.append(_pixels(figure))
        figure.set_layout_engine("none")  # that of the first page is kept
    with replacing(path) as draft:
        _write_gif(draft, pages, fps)


def _framed(frame: Tensor, *, outlined: bool) -> Tensor:
    """``[H, W, 3]`` uint8 levels of ``frame [3, H, W]``, enlarged, with outline and margin."""
    large = F.interpolate(frame[None], scale_factor=_ENLARGED, mode="bicubic")[0].clamp(-1, 1)
    levels = to_levels(large)
    for width, color in ((_OUTLINE, _GIVEN if outlined else _OTHER), (_GAP, BACKGROUND)):
        around = F.pad(levels, (width,) * 4)
        inside = F.pad(torch.ones_like(levels, dtype=torch.bool), (width,) * 4)
        levels = torch.where(inside, around, torch.tensor(color, dtype=torch.uint8)[:, None, None])
    return levels.permute(1, 2, 0)


def _bare(axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for edge in axis.spines.values():
        edge.set_visible(False)


def _pixels(figure: Figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def _write_gif(path: Path, pages: Sequence[Image.Image], fps: Fraction) -> None:
    """One palette for all pages, so that what does not change takes no bytes; the last waits."""
    strip = Image.new("RGB", (pages[0].width, pages[0].height * len(pages)))
    for number, page in enumerate(pages):
        strip.paste(page, (0, number * page.height))
    # A sixteenth of the pixels: all take 8 seconds.
    some = strip.resize((strip.width // 4, strip.height // 4), Image.Resampling.NEAREST)
    palette = some.quantize(256, Image.Quantize.MAXCOVERAGE)
    first, *others = (page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages)
    times = [round(1000 / fps)] * (len(pages) - 1) + [1000]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=times, loop=0)
