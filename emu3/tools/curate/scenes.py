"""Cuts of a video, and the clips between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path

import av
import numpy as np

from emu3.data.media import MediaError, decode, open_video
from emu3.tools.curate.settings import MeasureSettings

_WIDTH = 256
"""Pixels of the longer side that cuts are found at, as in PySceneDetect."""


@dataclass(frozen=True)
class Clip:
    """Frames ``[first, stop)`` of a video, without a cut between them."""

    first: int
    stop: int
    begin: float
    """Seconds at which the first frame starts."""
    end: float
    """Seconds at which the last one ends."""


@dataclass(frozen=True)
class Scenes:
    """A video that was read to its end."""

    height: int
    width: int
    fps: Fraction
    clips: list[Clip]


def find_scenes(path: Path, how: MeasureSettings) -> Scenes:
    """Cut a video where PySceneDetect's detectors of content and of fades do.

    Raises:
        MediaError: not a video, damaged, or of changing size.
    """
    video = open_video(path)
    starts: list[Fraction] = []
    cuts = _cuts(path, video.fps, how, starts)
    ends = [*starts[1:], starts[-1] + 1 / video.fps]
    clips = []
    for first, stop in pairwise([0, *cuts, len(starts)]):
        bounds = _bounds(first, stop, float(ends[stop - 1] - starts[first]), how.longest)
        clips += [Clip(a, b, _seconds(starts[a]), _seconds(ends[b - 1])) for a, b in bounds]
    return Scenes(video.height, video.width, video.fps, clips)


def _seconds(time: Fraction) -> float:
    return round(float(time), 6)


def _bounds(first: int, stop: int, seconds: float, longest: float) -> Iterator[tuple[int, int]]:
    """Equal pieces, as few as are not too long."""
    pieces = min(ceil(round(seconds / longest, 6)), stop - first)
    for piece in range(max(1, pieces)):
        yield tuple(first + (stop - first) * end // max(1, pieces) for end in (piece, piece + 1))


def _cuts(path: Path, fps: Fraction, how: MeasureSettings, starts: list[Fraction]) -> list[int]:
    """Frames at which a scene starts, but for the first; ``starts`` is filled."""
    from scenedetect import ContentDetector, FrameTimecode, ThresholdDetector

    detectors = (
        ContentDetector(how.content_threshold, min_scene_len=how.min_scene_frames),
        ThresholdDetector(how.fade_threshold, min_scene_len=how.min_scene_frames),
    )
    cuts: set[int] = set()
    size = None
    for start, frame in decode(path):
        if size is None:
            size = frame.width, frame.height
        if size != (frame.width, frame.height):
            raise MediaError(f"video: {path} changes size at frame {len(starts)}")
        at, pixels = FrameTimecode(len(starts), fps), _small(frame)
        for detector in detectors:
            cuts.update(cut.frame_num for cut in detector.process_frame(at, pixels))
        starts.append(start)
    return sorted(cut for cut in cuts if 0 < cut < len(starts))


def _small(frame: av.VideoFrame) -> np.ndarray:
    scale = min(1.0, _WIDTH / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    return frame.to_ndarray(format="bgr24", width=width, height=height, threads=1)
