"""What the JSON lines of an evaluation contain, and a bar over what is evaluated."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import track
from typing_extensions import Self

from emu3.settings import Settings, parse

Line = TypeVar("Line", bound=Settings)
T = TypeVar("T")


class PromptLine(Settings):
    """A prompt to generate an image from; GenEval's metadata is read as it is."""

    prompt: str = Field(min_length=1)
    tag: str = ""
    """The group whose mean is reported."""
    choices: tuple[str, ...] = ()
    """Other prompts; the image is right if a voter scores its own highest."""
    include: tuple[Any, ...] = ()
    exclude: tuple[Any, ...] = ()
    """GenEval's objects. A line with some is compared with all prompts of its tag."""


class QuestionLine(Settings):
    """A question about images or a video, and its answer, or several that are right."""

    question: str = Field(min_length=1)
    answer: str | tuple[str, ...]
    image: Path | None = None
    images: tuple[Path, ...] = ()
    video: Path | None = None
    tag: str = ""
    """The group whose accuracy is reported."""

    @property
    def shown(self) -> list[Path]:
        """All files, in the order in which the model sees them."""
        return [*([self.image] if self.image else []), *self.images, *self._videos]

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer,) if isinstance(self.answer, str) else self.answer

    @property
    def _videos(self) -> list[Path]:
        return [self.video] if self.video else []

    @model_validator(mode="after")
    def _is_answered(self) -> Self:
        if not self.answers:
            raise ValueError("answer must name one right answer at least")
        return self


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a JSONL file; empty ones are left out.

    Raises:
        ValueError: one line that names the file and the number of the first wrong line.
    """
    found = []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"evaluate: {path} must be UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
            if not isinstance(tree, dict):
                raise ValueError(f"must be a JSON object, got {line[:40]}")
            found.append(parse(kind, tree))
        except ValueError as error:
            raise ValueError(f"evaluate: {path} line {number}: {error}") from None
    if not found:
        raise ValueError(f"evaluate: {path} has no line")
    return found


def batches(items: Sequence[T], size: int, title: str) -> Iterator[Sequence[T]]:
    """``items`` by ``size``, with a bar on stderr if that is a terminal."""
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    return watched(parts, title)


def watched(items: Sequence[T], title: str) -> Iterator[T]:
    """``items``, with a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    yield from track(items, title, console=console, disable=not console.is_terminal)


def by_tag(tags: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """The mean value of each tag that is not empty."""
    groups: dict[str, list[float]] = {}
    for tag, value in zip(tags, values, strict=True):
        if tag:
            groups.setdefault(tag, []).append(value)
    return {tag: sum(group) / len(group) for tag, group in sorted(groups.items())}
