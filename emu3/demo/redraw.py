"""The tokenizer's demo: train it, then draw again what it never saw, and measure what was lost."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emu3.config import MediaSettings, load_recipe
from emu3.data.crops import Collection, CropStream, load_split
from emu3.data.media import write_image, write_video
from emu3.demo.run import machine
from emu3.files import replacing
from emu3.tools.compare import fidelity
from emu3.train.loop import train
from emu3.train.tokenizer import tokenizer_stage
from emu3.train.usage import perplexity
from emu3.vision import VisionTokenizer
from emu3.vision.images import to_levels
from emu3.weights import load_vision

_FPS = Fraction(25)
_STRIP_WIDTH = 1200
_LONGEST = 80
"""Frames of a held-out clip that are drawn again; decoding takes a second for each on two cores."""
_LEARNED_STEPS = 40
"""Batches of training crops whose codes count as the learned part's."""


@dataclass(frozen=True)
class Redrawn:
    """A held-out work before and after, ``[T, 3, H, W]`` uint8 each, and its codes."""

    real: Tensor
    drawn: Tensor
    codes: Tensor

    def figures(self) -> dict:
        pairs = [fidelity(*frames) for frames in zip(self.real, self.drawn, strict=True)]
        psnr, ssim = (fmean(values) for values in zip(*pairs, strict=True))
        return {
            "psnr": round(psnr, 3),
            "ssim": round(ssim, 4),
            "size": list(self.real.shape[2:]),
            "frames": len(self.real),
            "codes_used": self.codes.unique().numel(),
        }


def run_redraw(folder: Path, recipe: str = "tokenizer", words: Sequence[str] = ()) -> dict:
    """Train the tokenizer of a recipe in ``folder/run``; leave pictures and ``report.json``.

    Every figure but seconds depends on the recipe's seed alone. A run that is there goes on.

    Returns:
        what ``report.json`` holds: PSNR and SSIM of every held-out picture and clip at its own
        size, and the share of the codes that are used.
    """
    settings = load_recipe(recipe, words)
    started = time.perf_counter()
    weights = train(settings, folder / "run", tokenizer_stage, resume=True)
    seconds = time.perf_counter() - started
    tokenizer = load_vision(weights)
    learned, held_out = load_split(settings.media)
    report = {
        **measure(folder, tokenizer, held_out, learned, settings.media),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "steps": settings.train.steps,
        "train_seconds": round(seconds, 1),
        "machine": machine(),
    }
    with replacing(folder / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n")
    _show(folder, report)
    return report


def measure(
    folder: Path,
    tokenizer: VisionTokenizer,
    held_out: Collection,
    learned: Collection,
    settings: MediaSettings,
) -> dict:
    """Draw what was held out again, of clips the beginning, beside the original; count codes."""
    report: dict = {"pictures": {}, "clips": {}}
    seen = torch.zeros(tokenizer.settings.num_codes, dtype=torch.int64)
    for name, picture in held_out.pictures.items():
        redrawn = redraw(tokenizer, picture[None])
        write_image(folder / f"{name}.png", torch.cat((redrawn.real[0], redrawn.drawn[0]), dim=2))
        report["pictures"][name] = redrawn.figures()
        seen += _counts(redrawn.codes, tokenizer)
    for name, clip in held_out.clips.items():
        redrawn = redraw(tokenizer, clip[:_LONGEST])
        beside = torch.cat((redrawn.real, redrawn.drawn), dim=3)
        write_video(folder / f"{name}.mp4", beside, _FPS)
        write_image(folder / f"{name}.png", _strip(redrawn))
        report["clips"][name] = redrawn.figures()
        seen += _counts(redrawn.codes, tokenizer)
    both = seen + _learned_counts(tokenizer, learned, settings)
    return {**report, "held_out_codes": _usage(seen), "all_codes": _usage(both)}


@torch.no_grad()
def redraw(tokenizer: VisionTokenizer, frames: Tensor) -> Redrawn:
    """Encode and decode ``[T, 3, H, W]`` uint8: one frame as a picture, more in pieces of four.

    What does not fill a code, at the right, the bottom and the end, is cut off.
    """
    still, (count, _, height, width) = len(frames) == 1, frames.shape
    side, span = tokenizer.settings.spatial_factor, tokenizer.settings.temporal_factor
    whole = frames if still else frames[: count // span * span]
    whole = whole[..., : height // side * side, : width // side * side]
    drawn, codes = [], []
    for piece in whole.split(1 if still else span):
        pixels = piece / 127.5 - 1
        codes.append(tokenizer.encode(pixels if still else pixels[None]))
        drawn.append(to_levels(tokenizer.decode(codes[-1])).view(piece.shape))
    return Redrawn(whole, torch.cat(drawn), torch.cat(codes))


def _strip(redrawn: Redrawn) -> Tensor:
    """Four frames over the length of a clip, above their reconstructions, large enough to see."""
    frames = [i * len(redrawn.real) // 4 for i in range(4)]
    rows = (torch.cat(list(part[frames]), dim=2) for part in (redrawn.real, redrawn.drawn))
    strip = torch.cat(list(rows), dim=1)
    grow = max(1, round(_STRIP_WIDTH / strip.shape[2]))
    return F.interpolate(strip[None], scale_factor=grow, mode="nearest")[0]


def _counts(codes: Tensor, tokenizer: VisionTokenizer) -> Tensor:
    return torch.bincount(codes.flatten(), minlength=tokenizer.settings.num_codes)


def _learned_counts(
    tokenizer: VisionTokenizer, learned: Collection, settings: MediaSettings
) -> Tensor:
    stream = CropStream(learned, settings, seed=0)
    batches = (stream.next_batch() for _ in range(_LEARNED_STEPS))
    return sum(
        _counts(tokenizer.encode(pixels), tokenizer)
        for batch in batches
        for pixels in batch
        if len(pixels)
    )


def _usage(counts: Tensor) -> dict:
    return {
        "usage": round(float((counts > 0).double().mean()), 4),
        "perplexity": round(perplexity(counts), 1),
        "of": len(counts),
        "drawn": int(counts.sum()),
    }


def _show(folder: Path, report: dict) -> None:
    table = Table("held out", "PSNR dB", "SSIM", title=f"{folder}/report.json")
    for name, figures in (report["pictures"] | report["clips"]).items():
        table.add_row(name, f"{figures['psnr']:.2f}", f"{figures['ssim']:.3f}")
    for name in ("held_out_codes", "all_codes"):
        table.add_row(name.replace("_", " "), f"{report[name]['usage']:.1%} used", "")
    table.add_row("seconds of training", f"{report['train_seconds']:g}", "")
    Console().print(table)
