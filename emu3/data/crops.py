"""Images and clips for the tokenizer: the training and validation split, and random crops.

``P`` images and ``V`` clips of ``T`` frames to a step; ``S`` the side of a crop.
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
    """Images ``[3, H, W]`` and clips ``[T, 3, H, W]`` by name, uint8, in memory.

    A name is the file's own without its ending; of several the second ends in ``-2``.
    """

    images: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)


def load_split(settings: MediaSettings) -> tuple[Collection, Collection]:
    """Read every file of ``settings``; return the training part and the validation part.

    Validation takes the files named in ``validation`` and the end of every other clip.

    Raises:
        ValueError: a name in ``validation`` matches no file, or a source is missing or empty.
    """
    files = _named(_files(settings.sources))
    if unknown := set(settings.validation) - {path.stem for path in files.values()}:
        raise ValueError(f"media.validation: no file is called {', '.join(sorted(unknown))}")
    train_set, validation_set = Collection(), Collection()
    for name, path in files.items():
        part = validation_set if path.stem in settings.validation else train_set
        if path.suffix.lower() in IMAGES:
            part.images[name] = read_image(path)
            continue
        clip = torch.stack(list(open_video(path)))
        num_train = len(clip) - int(len(clip) * settings.validation_tail)
        part.clips[name] = clip if part is validation_set else clip[:num_train]
        if part is train_set and num_train < len(clip):
            validation_set.clips[name] = clip[num_train:]
    return train_set, validation_set


def _files(sources: Iterable[Path]) -> list[Path]:
    """Each file once; a folder yields its images and videos, no source the samples."""
    known = IMAGES | VIDEOS
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"media.sources: no file or folder {source}")
        if not source.is_dir():
            paths.append(source)
            continue
        inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in known)
        if not inside:
            raise ValueError(f"media.sources: {source} contains no image or video")
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

    A file is sampled in proportion to the square root of its pixels, then a downscaling factor, a
    position and a horizontal flip.
    """

    def __init__(self, collection: Collection, settings: MediaSettings, seed: int) -> None:
        self.settings = settings
        self.images = _Pool(collection.images, settings.crop, frames=1)
        self.clips = _Pool(collection.clips, settings.crop, frames=settings.frames)
        self.generator = torch.Generator().manual_seed(seed)
        for name in ("images", "clips"):
            if getattr(settings, name) and not getattr(self, name).clips:
                frames = f" and of {settings.frames} frames" if name == "clips" else ""
                raise ValueError(
                    f"media.{name}: nothing as large as a crop of {settings.crop}{frames}"
                )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Images ``[P, 3, S, S]`` and clips ``[V, T, 3, S, S]`` in [-1, 1]."""
        s = self.settings
        images = [self._sample(self.images)[0] for _ in range(s.images)]
        clips = [self._sample(self.clips) for _ in range(s.clips)]
        empty = torch.empty(0, s.frames, 3, s.crop, s.crop)
        return (
            torch.stack(images) if images else empty[:, 0],
            torch.stack(clips) if clips else empty,
        )

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def _sample(self, pool: "_Pool") -> Tensor:
        clip = pool.clips[int(torch.multinomial(pool.weights, 1, generator=self.generator))]
        side = self.settings.crop
        factor = 1 + self._below(min(self.settings.shrink, min(clip.shape[2:]) // side))
        start = self._below(len(clip) - pool.frames + 1)
        top, left = (self._below(size - factor * side + 1) for size in clip.shape[2:])
        crop = clip[
            start : start + pool.frames,
            :,
            top : top + factor * side,
            left : left + factor * side,
        ]
        crop = F.avg_pool2d(crop / 127.5 - 1, factor)
        return crop.flip(-1) if self._below(2) else crop

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


class _Pool:
    """The clips ``[T, 3, H, W]`` as large as a crop or larger, and their sampling weights."""

    def __init__(self, files: dict[str, Tensor], side: int, *, frames: int) -> None:
        all_clips = (clip if clip.ndim == 4 else clip[None] for clip in files.values())
        self.frames = frames
        self.clips = [w for w in all_clips if len(w) >= frames and min(w.shape[2:]) >= side]
        self.weights = torch.tensor([float(w.shape[2] * w.shape[3]) ** 0.5 for w in self.clips])
