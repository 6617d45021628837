"""Images and clips from prompts into files: ``emu3 generate``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from emu3.data.media import write_image, write_video
from emu3.generate import Forwards, Sampling, Window, generate_clips, generate_images
from emu3.generate.visual import Watch
from emu3.prompt import Clip
from emu3.templates import NEGATIVE, POSITIVE, grid_of
from emu3.tools.look import is_published, is_video, look
from emu3.tools.origin import Origin, program_version
from emu3.vision import VisionTokenizer, decode_pieces
from emu3.vision.images import to_levels
from emu3.weights import Pretrained

_GREY = 128
_AREAS = 720 * 720, 512 * 512
"""Pixels of an image and of a frame, of a published model."""


@dataclass(frozen=True)
class Plan:
    """What the files of a run have in common."""

    origin: Origin
    """With nothing left to the model."""
    begun: Tensor
    """``[s, h, w]`` codes that a clip begins with; s is 0 if it begins with none."""
    num_frames: int
    """Of codes, those that are drawn."""
    fps: Fraction | None = None
    """Of a clip."""

    @property
    def num_codes(self) -> int:
        return self.num_frames * prod(self.origin.grid)


def plan(asked: Origin, loaded: Pretrained) -> Plan:
    """Set what ``asked`` leaves to the model, and encode what a clip begins with.

    Raises:
        ValueError: one line, for what this model cannot draw.
    """
    vision, published = loaded.vision.settings, is_published(loaded)
    if asked.video and vision.temporal_factor == 1:
        raise ValueError("generate: the vision tokenizer takes images alone, and no video")
    words = published and not asked.video
    usual_area = _AREAS[asked.video] if published else vision.image_size**2
    area = usual_area if asked.area is None else asked.area
    begun, fps = _begin(asked, loaded, area)
    told = {
        "positive": (POSITIVE if words else "") if asked.positive is None else asked.positive,
        "negative": (NEGATIVE if words else "") if asked.negative is None else asked.negative,
        "area": area,
        "grid": tuple(begun.shape[1:]),
        "dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch."),
        "version": program_version(),
    }
    if not asked.video:
        return Plan(asked.model_copy(update=told), begun, 1)
    fps = fps or Fraction(24 if published else 8)
    span = vision.temporal_factor
    seconds = Fraction(asked.seconds or (5 if published else 1))
    frames = asked.frames or span * max(1, round(seconds * fps / span))
    if frames % span:
        raise ValueError(f"generate: frames must be a multiple of {span}, got {frames}")
    told |= {"frames": frames, "seconds": None}
    continues = asked.start is not None and is_video(Path(asked.start.path))
    if not continues:  # all frames of the given one are taken unless a rate is asked for
        told["fps"] = str(fps)
    num_frames = frames // span - (len(begun) if not continues else 0)
    return Plan(asked.model_copy(update=told), begun, num_frames, fps)


def _begin(asked: Origin, loaded: Pretrained, area: int) -> tuple[Tensor, Fraction | None]:
    """The codes that are given, or none of the right size, and the frame rate."""
    fps = None if asked.fps is None else Fraction(asked.fps)
    if asked.start is None:
        grid = grid_of(asked.ratio or "1:1", area, loaded.vision.settings.spatial_factor)
        return torch.empty(0, *grid, dtype=torch.int64), fps
    seen = look(Path(asked.start.path), loaded, area=area, fps=fps, whole=False)
    return (seen.codes, seen.fps) if isinstance(seen, Clip) else (seen[None], fps)


def draw(
    loaded: Pretrained,
    made: Plan,
    files: Sequence[tuple[Path, Origin]],
    *,
    batch: int = 4,
    preview: bool = False,
) -> Iterator[tuple[Path, float]]:
    """Draw each prompt with its seed; yield its path once it is written, and the codes a forward.

    Args:
        loaded: the model.
        made: what the files have in common.
        files: where each goes, and what it is: ``made.origin`` with a prompt and a seed of its own.
        batch: how many are drawn together.
        preview: whether a file is written as it grows too: an image where a row of codes ends, a
            clip where a frame of codes does.
    """
    with _progress(len(files) * made.num_codes) as advance_to:
        for first in range(0, len(files), batch):
            part, before = files[first : first + batch], first * made.num_codes
            watch = _watcher(loaded.vision, made, part, partial(advance_to, before), preview)
            drawn, spent = _generate(loaded, made, part, watch)
            for file, codes in zip(part, drawn, strict=True):
                _write(loaded.vision, made, *file, codes.flatten())
                yield file[0], spent.codes_per_forward


def _watcher(
    vision: VisionTokenizer,
    made: Plan,
    files: Sequence[tuple[Path, Origin]],
    advance: Callable[[int], None],
    preview: bool,
) -> Watch:
    """What moves the progress bar and writes previews, each once."""
    size = prod(made.origin.grid) if made.origin.video else made.origin.grid[1]
    written = [0] * len(files)

    def watch(codes: Sequence[Tensor]) -> None:
        advance(sum(map(len, codes)))
        for number, drawn in enumerate(codes if preview else ()):
            whole = len(drawn) // size * size
            if written[number] < whole < made.num_codes:
                written[number] = whole
                _write(vision, made, *files[number], drawn[:whole])

    return watch


def _generate(
    loaded: Pretrained,
    made: Plan,
    files: Sequence[tuple[Path, Origin]],
    watch: Watch,
) -> tuple[Tensor, Forwards]:
    """The codes of each file, without those that were given, and what they took."""
    common, begun = made.origin, made.begun
    how = Sampling(common.guidance, common.top_k, common.top_p, common.temperature, common.negative)
    captions = [origin.prompt + origin.positive for _, origin in files]
    asked = loaded.model, loaded.text, captions
    seeds = [origin.seed for _, origin in files]
    spent, window = Forwards(), Window(common.window, common.fork)
    loop = {"window": window, "spent": spent, "watch": watch}
    if not common.video:
        return generate_images(*asked, common.grid, how, seeds, **loop), spent
    shape = len(begun) + made.num_frames, *common.grid
    given = begun.expand(len(files), -1, -1, -1)
    span = loaded.vision.settings.temporal_factor
    rest = {"given": given, "span": span, **loop}
    clips = generate_clips(*asked, shape, made.fps, how, seeds, **rest)
    return clips[:, len(begun) :], spent


def _write(vision: VisionTokenizer, made: Plan, path: Path, origin: Origin, codes: Tensor) -> None:
    """Write an image or a clip, or as much of it as ``codes [n]`` have."""
    if not origin.video:
        write_image(path, picture(vision, codes, origin.grid), origin.about())
        return
    frames = torch.cat((made.begun.to(codes), codes.view(-1, *origin.grid)))
    clips = decode_pieces(vision, frames[None].split(1, dim=1))
    images = (to_levels(image).cpu() for clip in clips for image in clip[0])
    write_video(path, images, made.fps, origin.about())


def picture(vision: VisionTokenizer, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[3, H, W]`` uint8 of the first rows of codes of an image; what is missing is grey.

    Args:
        vision: decodes.
        codes: ``[n]`` whole rows, at least one.
        grid: rows and columns of codes of the whole image.
    """
    drawn = to_levels(vision.decode(codes.view(1, -1, grid[1])))[0].cpu()
    missing = drawn.new_full(
        (3, grid[0] * vision.settings.spatial_factor - drawn.shape[1], drawn.shape[2]), _GREY
    )
    return torch.cat((drawn, missing), dim=1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over all codes on stderr, if that is a terminal; yield how it is moved."""
    console = Console(stderr=True)
    share = TextColumn("{task.percentage:>3.0f} %")
    columns = BarColumn(), share, _Speed(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda before, done: progress.update(task, completed=before + done)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")
