"""The tokenizer's demo: train it, then reconstruct the validation files and measure the loss."""

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

from emu3.config import MediaSettings, Recipe, load_recipe
from emu3.data.crops import Collection, CropStream, load_split
from emu3.data.media import write_image, write_video
from emu3.demo.run import machine
from emu3.files import replacing
from emu3.tools.compare import fidelity
from emu3.train import checkpoint
from emu3.train.lock import locked
from emu3.train.loop import train
from emu3.train.tokenizer import tokenizer_stage
from emu3.train.usage import perplexity
from emu3.vision import VisionTokenizer
from emu3.vision.images import to_levels
from emu3.weights import load_vision

_FPS = Fraction(25)
_STRIP_WIDTH = 1200
_LONGEST = 80
"""Frames of a validation clip that are reconstructed; each takes a second on two cores."""
_TRAIN_STEPS = 40
"""Batches of training crops whose codes are counted."""


@dataclass(frozen=True)
class Reconstruction:
    """Original and reconstruction, ``[T, 3, H, W]`` uint8 each, and the codes."""

    real: Tensor
    reconstructed: Tensor
    codes: Tensor

    def metrics(self) -> dict:
        pairs = [fidelity(*frames) for frames in zip(self.real, self.reconstructed, strict=True)]
        psnr, ssim = (fmean(values) for values in zip(*pairs, strict=True))
        return {
            "psnr": round(psnr, 3),
            "ssim": round(ssim, 4),
            "size": list(self.real.shape[2:]),
            "frames": len(self.real),
            "codes_used": self.codes.unique().numel(),
        }


def run_redraw(folder: Path, recipe: str = "tokenizer", words: Sequence[str] = ()) -> dict:
    """Train the tokenizer of a recipe in ``folder/run``; write images and ``report.json``.

    Every number but seconds depends on the recipe's seed alone. An existing run is resumed.

    Returns:
        the contents of ``report.json``: PSNR and SSIM of every validation image and clip at its
        own size, and the share of the codes that are used.
    """
    settings = load_recipe(recipe, words)
    with locked(folder):
        return _redraw(folder, settings)


def _redraw(folder: Path, settings: Recipe) -> dict:
    started, run = time.perf_counter(), folder / "run"
    weights = train(settings, run, tokenizer_stage, resume=(run / checkpoint.FILE).exists())
    seconds = time.perf_counter() - started
    tokenizer = load_vision(weights)
    train_set, validation_set = load_split(settings.media)
    report = {
        **measure(folder, tokenizer, validation_set, train_set, settings.media),
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
    validation_set: Collection,
    train_set: Collection,
    settings: MediaSettings,
) -> dict:
    """Reconstruct the validation files, of clips the beginning; write both side by side."""
    report: dict = {"images": {}, "clips": {}}
    counts = torch.zeros(tokenizer.settings.num_codes, dtype=torch.int64)
    for name, image in validation_set.images.items():
        found = reconstruct(tokenizer, image[None])
        write_image(
            folder / f"{name}.png", torch.cat((found.real[0], found.reconstructed[0]), dim=2)
        )
        report["images"][name] = found.metrics()
        counts += _counts(found.codes, tokenizer)
    for name, clip in validation_set.clips.items():
        found = reconstruct(tokenizer, clip[:_LONGEST])
        beside = torch.cat((found.real, found.reconstructed), dim=3)
        write_video(folder / f"{name}.mp4", beside, _FPS)
        write_image(folder / f"{name}.png", _strip(found))
        report["clips"][name] = found.metrics()
        counts += _counts(found.codes, tokenizer)
    total = counts + _train_counts(tokenizer, train_set, settings)
    return {**report, "validation_codes": _usage(counts), "all_codes": _usage(total)}


@torch.no_grad()
def reconstruct(tokenizer: VisionTokenizer, frames: Tensor) -> Reconstruction:
    """Encode and decode ``[T, 3, H, W]`` uint8 in pieces of four frames, fewer one by one.

    Pixels and frames that do not fill a code, at the right, bottom and end, are cropped.
    """
    count, _, height, width = frames.shape
    side, span = tokenizer.settings.spatial_factor, tokenizer.settings.temporal_factor
    by_image = span == 1 or count < span
    whole = frames if by_image else frames[: count // span * span]
    whole = whole[..., : height // side * side, : width // side * side]
    reconstructed, codes = [], []
    for piece in whole.split(1 if by_image else span):
        pixels = piece / 127.5 - 1
        codes.append(tokenizer.encode(pixels if by_image else pixels[None]))
        reconstructed.append(to_levels(tokenizer.decode(codes[-1])).view(piece.shape))
    return Reconstruction(whole, torch.cat(reconstructed), torch.cat(codes))


def _strip(found: Reconstruction) -> Tensor:
    """Four frames over the length of a clip, above their reconstructions, enlarged."""
    frames = [i * len(found.real) // 4 for i in range(4)]
    rows = (torch.cat(list(part[frames]), dim=2) for part in (found.real, found.reconstructed))
    strip = torch.cat(list(rows), dim=1)
    grow = max(1, round(_STRIP_WIDTH / strip.shape[2]))
    return F.interpolate(strip[None], scale_factor=grow, mode="nearest")[0]


def _counts(codes: Tensor, tokenizer: VisionTokenizer) -> Tensor:
    return torch.bincount(codes.flatten(), minlength=tokenizer.settings.num_codes)


def _train_counts(
    tokenizer: VisionTokenizer, train_set: Collection, settings: MediaSettings
) -> Tensor:
    stream = CropStream(train_set, settings, seed=0)
    batches = (pixels for _ in range(_TRAIN_STEPS) for pixels in stream.next_batch() if len(pixels))
    if tokenizer.settings.temporal_factor == 1:
        batches = (b.flatten(0, 1) if b.ndim == 5 else b for b in batches)
    return sum(_counts(tokenizer.encode(pixels), tokenizer) for pixels in batches)


def _usage(counts: Tensor) -> dict:
    return {
        "usage": round(float((counts > 0).double().mean()), 4),
        "perplexity": round(perplexity(counts), 1),
        "of": len(counts),
        "total": int(counts.sum()),
    }


def _show(folder: Path, report: dict) -> None:
    table = Table("validation", "PSNR dB", "SSIM", title=f"{folder}/report.json")
    for name, metrics in (report["images"] | report["clips"]).items():
        table.add_row(name, f"{metrics['psnr']:.2f}", f"{metrics['ssim']:.3f}")
    for name in ("validation_codes", "all_codes"):
        table.add_row(name.replace("_", " "), f"{report[name]['usage']:.1%} used", "")
    table.add_row("seconds of training", f"{report['train_seconds']:g}", "")
    Console().print(table)
