"""A file to its rows: one for an image, one for each clip of a video."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import av
import numpy as np
from torch import Tensor

from emu3.data.media import decode, upright_rows
from emu3.tools.curate.inputs import File
from emu3.tools.curate.measures import (
    can_flow,
    damage,
    flow,
    grey,
    perceptual_hash,
    shrunk,
    text_cover,
)
from emu3.tools.curate.scenes import Clip, find_scenes
from emu3.tools.curate.settings import MeasureSettings

_DIGITS = 6
SAMPLED = 1, 3, 5
"""Sixths of a clip whose frames are scored by damage, hash and voters."""


def sampled_frames(first: int, stop: int) -> list[int]:
    """The frames of a clip at its sixths 1, 3 and 5."""
    return [first + (stop - first) * sixth // 6 for sixth in SAMPLED]


def image_row(file: File, words: str, image: Tensor, how: MeasureSettings) -> dict[str, Any]:
    """Scores of an image ``[3, H, W]`` uint8."""
    _, height, width = image.shape
    small = shrunk(image.permute(1, 2, 0).numpy(), how.short_edge)
    luma = grey(small)
    scores = _Scores()
    scores.add(small, luma, how)
    scores.sample(small, luma)
    return {
        **file.where,
        "id": str(file.name),
        "kind": "image",
        **_size(height, width),
        **scores.all(),
        "words": words,
    }


def video_rows(
    file: File, words: str, path: Path, how: MeasureSettings, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Scores of every clip of a video; it is decoded twice, for its cuts and within them."""
    report("cuts")
    scenes = find_scenes(path, how)
    rows = []
    for clip, scores in zip(
        scenes.clips, _clip_scores(path, scenes.clips, how, report), strict=True
    ):
        rows.append(
            {
                **file.where,
                "id": f"{file.name}#{clip.first}-{clip.stop}",
                "kind": "clip",
                "first": clip.first,
                "stop": clip.stop,
                "begin": clip.begin,
                "end": clip.end,
                "seconds": round(clip.end - clip.begin, _DIGITS),
                "fps": round(float(scenes.fps), _DIGITS),
                **_size(scenes.height, scenes.width),
                **scores.all(),
                "words": words,
            }
        )
    return rows


def _size(height: int, width: int) -> dict[str, Any]:
    short, long = sorted((height, width))
    size = {"width": width, "height": height, "short_edge": short}
    return size | {"aspect": round(long / short, _DIGITS)}


@dataclass
class _Scores:
    """What is measured of the frames of one image or clip."""

    luma: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    flow: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    colourfulness: list[float] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def add(self, frame: np.ndarray, luma: np.ndarray, how: MeasureSettings) -> None:
        self.luma.append(float(luma.mean()))
        if how.text:
            self.text.append(text_cover(frame, how.short_edge, how.text_score))

    def sample(self, frame: np.ndarray, luma: np.ndarray) -> None:
        sharpness, colourfulness = damage(frame)
        self.sharpness.append(sharpness)
        self.colourfulness.append(colourfulness)
        self.hashes.append(perceptual_hash(luma))

    def all(self) -> dict[str, Any]:
        """Means, and of sharpness the least; what was not measured is None."""
        means = {name: getattr(self, name) for name in ("luma", "text", "flow", "colourfulness")}
        scores = {name: fmean(values) if values else None for name, values in means.items()}
        scores["sharpness"] = min(self.sharpness)
        rounded = {n: None if v is None else round(v, _DIGITS) for n, v in scores.items()}
        return rounded | {"hash": "".join(f"{value:016x}" for value in self.hashes)}


def _clip_scores(
    path: Path, clips: list[Clip], how: MeasureSettings, report: Callable[[str], None]
) -> list[_Scores]:
    all_scores = [_Scores() for _ in clips]
    waiting = iter(zip(clips, all_scores, strict=True))
    clip, scores = next(waiting)
    sampler = _Sampler(clip, how)
    for number, (start, frame) in enumerate(decode(path)):
        if number == clip.stop:
            clip, scores = next(waiting)
            sampler = _Sampler(clip, how)
            report(f"frame {number}")
        sampler.see(number, start, frame, scores)
    return all_scores


class _Sampler:
    """Which frames of a clip are measured by what."""

    def __init__(self, clip: Clip, how: MeasureSettings) -> None:
        self._how = how
        self._sampled = sampled_frames(clip.first, clip.stop)
        self._next_text = self._next_flow = Fraction(0)
        self._began: Fraction | None = None
        self._before: tuple[Fraction, np.ndarray] | None = None

    def see(self, number: int, start: Fraction, frame: av.VideoFrame, scores: _Scores) -> None:
        self._began = start if self._began is None else self._began
        passed = start - self._began
        for_text, for_flow = passed >= self._next_text, passed >= self._next_flow
        times = self._sampled.count(number)
        if not (for_text or for_flow or times):
            return
        rows = small_rows(frame, self._how.short_edge)
        luma = grey(rows)
        if for_text:
            self._next_text += 1 / Fraction(self._how.text_fps)
            scores.add(rows, luma, self._how)
        if for_flow and can_flow(luma):
            self._next_flow += 1 / Fraction(self._how.flow_fps)
            if self._before is not None:
                then, before = self._before
                pairs = (start - then) * Fraction(self._how.flow_fps)
                scores.flow.append(flow(before, luma) / float(pairs))
            self._before = start, luma
        for _ in range(times):
            scores.sample(rows, luma)


def small_rows(frame: av.VideoFrame, short_edge: int) -> np.ndarray:
    """A frame of a video upright as ``[H, W, 3]``, reduced to ``short_edge``."""
    return shrunk(upright_rows(frame), short_edge)
