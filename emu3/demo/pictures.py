"""The PNG files that the demo leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from emu3.demo.digits import BACKGROUND, COLORS, DIGITS, PALETTE
from emu3.files import replacing
from emu3.vision.images import to_levels

_PAGE = "#%02x%02x%02x" % BACKGROUND  # noqa: UP031 (the shortest way to write hex)
_WORDS = "#d8dbe6"
_FAINT = "#3a3f55"


def draw_grid(path: Path, pictures: Tensor) -> None:
    """One row per colour, one column per digit: ``pictures [colours, digits, 3, H, W]``."""
    figure = _page(12.0, 10.2, "Drawn by the miniature Emu3 from captions alone")
    axes = figure.subplots(len(COLORS), len(DIGITS), squeeze=False)
    for row, (color, paint) in enumerate(PALETTE.items()):
        for column, digit in enumerate(DIGITS):
            _picture(axes[row, column], pictures[row, column])
            if row == 0:
                axes[row, column].set_title(digit, color=_WORDS, fontsize=13)
        axes[row, 0].set_ylabel(color, color=[c / 255 for c in paint], fontsize=13)
    _write(figure, path)


def draw_reconstructions(path: Path, real: Tensor, redrawn: Tensor, grid: tuple[int, int]) -> None:
    """Held-out pictures above what is left of them after the codes, ``[n, 3, H, W]`` each."""
    columns, codes = 10, "x".join(map(str, grid))
    rows = 2 * (len(real) // columns)
    figure = _page(12.0, 1.35 * rows + 0.7, f"Held-out digits, and the same through {codes} codes")
    axes = figure.subplots(rows, columns, squeeze=False)
    for number in range(len(real)):
        row, column = divmod(number, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        _picture(above, real[number])
        _picture(below, redrawn[number])
        if column == 0:
            above.set_ylabel("scan", color=_WORDS)
            below.set_ylabel("codes", color=_WORDS)
    _write(figure, path)


def draw_captions(path: Path, pictures: Tensor, captions: Sequence[str], right: Tensor) -> None:
    """Held-out pictures under the captions that the model gave them, wrong ones marked."""
    columns = 6
    rows = -(-len(pictures) // columns)
    figure = _page(12.0, 2.2 * rows + 0.7, "What the miniature Emu3 says of held-out digits")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(pictures) :]:
        axis.set_visible(False)
    for axis, picture, words, good in zip(axes.flat, pictures, captions, right, strict=False):
        _picture(axis, picture)
        axis.set_title(words if good else f"{words} ✗", color=_WORDS if good else "#ff6b6b")
    _write(figure, path)


def draw_curves(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """The loss of every stage over its steps, raw and smoothed."""
    figure = _page(12.0, 4.8, "Training loss")
    for axis, (name, losses) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        values = np.asarray(losses)
        axis.set_facecolor(_PAGE)
        axis.plot(values, color=_FAINT, linewidth=1)
        axis.plot(_smooth(values), color="#5bd7ff", linewidth=2)
        axis.set_yscale("log")
        axis.set_title(name, color=_WORDS)
        axis.set_xlabel("step", color=_WORDS)
        axis.tick_params(colors=_WORDS, which="both")
        axis.grid(color=_FAINT, alpha=0.4, which="both")
        for edge in axis.spines.values():
            edge.set_color(_FAINT)
    _write(figure, path)


def _page(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), facecolor=_PAGE, layout="constrained")
    figure.suptitle(title, color=_WORDS, fontsize=16)
    FigureCanvasAgg(figure)
    return figure


def _picture(axis, picture: Tensor) -> None:
    axis.imshow(to_levels(picture).permute(1, 2, 0).numpy(), interpolation="bicubic")
    axis.set_xticks([])
    axis.set_yticks([])
    for edge in axis.spines.values():
        edge.set_color(_FAINT)


def _smooth(values: np.ndarray) -> np.ndarray:
    window = 1 + len(values) // 20
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def _write(figure: Figure, path: Path) -> None:
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    with replacing(path) as draft:
        image.save(draft)
