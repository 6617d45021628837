"""Pictures and clips for the tokenizer: what training may see, and random crops of it.

``P`` pictures and ``V`` clips of ``T`` frames to a step; ``S`` the side of a crop.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.config import MediaSettings
from emu3.data.media import IMAGES, VIDEOS, open_video, read_image
from emu3.data.samples import sample_files


@dataclass(frozen=True)
class Collection:
    """Pictures ``[3, H, W]`` and clips ``[T, 3, H, W]`` by name, uint8, held in memory.

    A name is the file's own without its ending; of several the second ends in ``-2``.
    """

    pictures: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)


def load_split(settings: MediaSettings) -> tuple[Collection, Collection]:
    """Read every file of ``settings``; return what training may see, and what it may not.

    Held out are the files of the names in ``hold_out``, and the end of every other clip.

    Raises:
        ValueError: a name in ``hold_out`` is that of no file, or a source is an empty folder.
    """
    files = _named(_files(settings.sources))
    if unknown := set(settings.hold_out) - {path.stem for path in files.values()}:
        raise ValueError(f"media.hold_out: no file is called {', '.join(sorted(unknown))}")
    learned, held_out = Collection(), Collection()
    for name, path in files.items():
        part = held_out if path.stem in settings.hold_out else learned
        if path.suffix.lower() in IMAGES:
            part.pictures[name] = read_image(path)
            continue
        clip = torch.stack(list(open_video(path)))
        kept = len(clip) - int(len(clip) * settings.hold_out_tail)
        part.clips[name] = clip if part is held_out else clip[:kept]
        if part is learned and kept < len(clip):
            held_out.clips[name] = clip[kept:]
    return learned, held_out


def _files(sources: Iterable[Path]) -> list[Path]:
    """Each file once; of a folder the pictures and videos, of no source the samples."""
    known = IMAGES | VIDEOS
    paths: list[Path] = []
    for source in sources:
        if not source.is_dir():
            paths.append(source)
            continue
        inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in known)
        if not inside:
            raise ValueError(f"media.sources: {source} holds no picture and no video")
        paths += inside
    return list(dict.fromkeys(paths)) or sample_files()


def _named(paths: Iterable[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        name, number = path.stem, 1
        while name in files:
            number += 1
            name = f"{path.stem}-{number}"
        files[name] = path
    return files


class CropStream:
    """Endless random crops; the generator's state is the whole state.

    A file is drawn in proportion to the square root of its pixels, then a place, a shrinking
    factor and a side to look from.
    """

    def __init__(self, collection: Collection, settings: MediaSettings, seed: int) -> None:
        self.settings = settings
        self.pictures = _Shelf(collection.pictures, settings.crop, frames=1)
        self.clips = _Shelf(collection.clips, settings.crop, frames=settings.frames)
        self.generator = torch.Generator().manual_seed(seed)
        for name in ("pictures", "clips"):
            if getattr(settings, name) and not getattr(self, name).works:
                raise ValueError(
                    f"media.{name}: nothing as large as a crop of {settings.crop} to draw from"
                )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Pictures ``[P, 3, S, S]`` and clips ``[V, T, 3, S, S]`` in [-1, 1]."""
        s = self.settings
        pictures = [self._draw(self.pictures)[0] for _ in range(s.pictures)]
        clips = [self._draw(self.clips) for _ in range(s.clips)]
        empty = torch.empty(0, s.frames, 3, s.crop, s.crop)
        return (
            torch.stack(pictures) if pictures else empty[:, 0],
            torch.stack(clips) if clips else empty,
        )

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def _draw(self, shelf: "_Shelf") -> Tensor:
        work = shelf.works[int(torch.multinomial(shelf.weights, 1, generator=self.generator))]
        side = self.settings.crop
        factor = 1 + self._below(min(self.settings.shrink, min(work.shape[2:]) // side))
        start = self._below(len(work) - shelf.frames + 1)
        top, left = (self._below(size - factor * side + 1) for size in work.shape[2:])
        crop = work[
            start : start + shelf.frames,
            :,
            top : top + factor * side,
            left : left + factor * side,
        ]
        crop = F.avg_pool2d(crop / 127.5 - 1, factor)
        return crop.flip(-1) if self._below(2) else crop

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


class _Shelf:
    """The works ``[T, 3, H, W]`` that a crop fits into, and how often each is drawn."""

    def __init__(self, works: dict[str, Tensor], side: int, *, frames: int) -> None:
        clips = (work if work.ndim == 4 else work[None] for work in works.values())
        self.frames = frames
        self.works = [w for w in clips if len(w) >= frames and min(w.shape[2:]) >= side]
        self.weights = torch.tensor([float(w.shape[2] * w.shape[3]) ** 0.5 for w in self.works])
