"""How well a vision tokenizer reconstructs images and videos."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from emu3.data.media import IMAGES, VIDEOS, open_video, read_image
from emu3.tools.bulk import Item, Report, each, find, from_input
from emu3.tools.compare import fidelity
from emu3.tools.evaluate.frechet import Moments, frechet_distance
from emu3.tools.look import resized
from emu3.train.perceptual import Lpips, load_lpips
from emu3.vision import VisionTokenizer
from emu3.vision.images import to_levels
from emu3.weights.clip import Clip

_SHOWN = 8
"""Files whose first frame is shown beside its reconstruction."""


@dataclass(frozen=True)
class HowSeen:
    """How a file becomes pixels of the vision tokenizer."""

    side: int | None
    """Of the square that every image becomes; None resizes as Emu3's image processor does."""
    area: int | None = None
    """Pixels that an image then has, about."""
    fps: Fraction | None = None
    """Frames a second that are taken of a video; None takes all."""
    lpips: Path | None = None
    """Weights of the perceptual distance."""
    clip: Clip | None = None
    """Whose embeddings the Fréchet distance compares."""


@dataclass
class Reconstructed:
    """Metrics of every file, and a few images above their reconstructions."""

    files: list[dict] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    shown: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    codes_used: int = 0
    real: Moments | None = None
    """Of all original frames, if there is a CLIP."""
    made: Moments | None = None
    """Of their reconstructions."""

    def report(self) -> dict:
        """Means over files of 8-bit RGB; equal images, of infinite PSNR, are counted apart."""
        names = ("psnr", "ssim", "lpips")
        columns = {n: [f[n] for f in self.files if f.get(n) is not None] for n in names}
        has_two = self.real is not None and self.real.count > 1
        distance = {"frechet_clip": frechet_distance(self.real, self.made)} if has_two else {}
        return {
            **{name: round(fmean(of), 4) for name, of in columns.items() if of},
            **distance,
            "files": len(self.files),
            "frames": sum(one["frames"] for one in self.files),
            "exact_files": sum(one["psnr"] is None for one in self.files),
            "failed_files": len(self.errors),
            "codes_used": self.codes_used,
            "of_each": self.files,
        }


def reconstruct_files(
    inputs: Sequence[Path], tokenizer: VisionTokenizer, how: HowSeen
) -> Reconstructed:
    """Encode and decode images and videos; PSNR in dB, SSIM, and LPIPS if it has weights.

    A file that fails is told in one line and left out. Of a video the last frames that do not
    fill a frame of codes are padded with the last one, and the padding is not measured.

    Raises:
        ValueError: one line, if there is no such file, or none can be read.
    """
    device = tokenizer.codebook.device
    lpips = None if how.lpips is None else load_lpips(how.lpips).to(device)
    found, seen = Reconstructed(), torch.zeros(tokenizer.settings.num_codes, dtype=torch.bool)
    if how.clip is not None:
        found.real, found.made = Moments(how.clip), Moments(how.clip)

    def work(item: Item, given: Tensor | Path, report: Report) -> None:
        pairs = _pairs(tokenizer, given, how, seen, report)
        metrics = _measure(_embedded(pairs, found), lpips, _keep(item, found))
        found.files.append({"file": item.name.as_posix(), **metrics})

    items = find(inputs, IMAGES | VIDEOS).items
    outcome = each(items, _read, work, lambda item: False)
    found.errors = outcome.errors
    if not found.files:
        raise ValueError(f"evaluate: none of {len(items)} files could be reconstructed")
    found.codes_used = int(seen.sum())
    return found


def _read(item: Item) -> Tensor | Path:
    """An image is read in a thread; the frames of a video would not fit the memory."""
    return item.source if item.source.suffix.lower() in VIDEOS else read_image(item.source)


def _pairs(
    tokenizer: VisionTokenizer, given: Tensor | Path, how: HowSeen, seen: Tensor, report: Report
) -> Iterator[tuple[Tensor, Tensor]]:
    """Original and reconstruction of each frame, ``[3, H, W]`` uint8."""
    if isinstance(given, Tensor):
        pixels = resized(given, how.side, how.area)
        yield to_levels(pixels), _round_trip(tokenizer, pixels[None], seen)[0]
        return
    span = tokenizer.settings.temporal_factor
    if span == 1:
        raise ValueError(f"{given}: the vision tokenizer takes images alone")
    frames = (
        resized(frame, how.side, how.area) for frame in from_input(open_video(given, how.fps))
    )
    count = 0
    while piece := list(islice(frames, span)):
        whole = torch.stack(piece + [piece[-1]] * (span - len(piece)))
        yield from zip(
            map(to_levels, piece), _round_trip(tokenizer, whole[None], seen)[0], strict=False
        )
        count += len(piece)
        report(f"frame {count}")


def _embedded(
    pairs: Iterator[tuple[Tensor, Tensor]], found: Reconstructed
) -> Iterator[tuple[Tensor, Tensor]]:
    """``pairs``; each frame is embedded if there is a CLIP."""
    for one, other in pairs:
        if found.real is not None and found.made is not None:
            found.real.add(one[None])
            found.made.add(other[None])
        yield one, other


def _round_trip(tokenizer: VisionTokenizer, pixels: Tensor, seen: Tensor) -> Tensor:
    codes = tokenizer.encode(pixels.to(tokenizer.codebook.device))
    seen[codes.flatten().cpu()] = True
    return to_levels(tokenizer.decode(codes)).cpu()


def _measure(
    pairs: Iterator[tuple[Tensor, Tensor]],
    lpips: Lpips | None,
    keep: Callable[[Tensor, Tensor], None],
) -> dict:
    rows, size = [], None
    for one, other in pairs:
        if not rows:
            keep(one, other)
        size = list(one.shape[1:])
        rows.append((*fidelity(one, other), *([_distance(lpips, one, other)] if lpips else [])))
    if not rows:
        raise ValueError("it has no frame")
    psnr, ssim, *more = (fmean(column) for column in zip(*rows, strict=True))
    known = {"psnr": round(psnr, 4) if math.isfinite(psnr) else None, "ssim": round(ssim, 5)}
    known |= {"lpips": round(more[0], 5)} if more else {}
    return {**known, "frames": len(rows), "size": size}


@torch.no_grad()
def _distance(lpips: Lpips, one: Tensor, other: Tensor) -> float:
    pair = torch.stack((one, other)).to(lpips.mean.device) / 127.5 - 1
    return lpips(pair[:1], pair[1:]).item()


def _keep(item: Item, found: Reconstructed) -> Callable[[Tensor, Tensor], None]:
    def keep(one: Tensor, other: Tensor) -> None:
        if len(found.shown) < _SHOWN:
            found.shown.append((item.name.as_posix(), one, other))

    return keep
