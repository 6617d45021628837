"""What a generated image or clip came from, told by its own file.

A PNG has it as JSON in the text chunk ``emu3``, an MP4 in its comment.
"""

import json
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from emu3.data.codes import Rate
from emu3.data.media import read_about
from emu3.generate import Sampling
from emu3.settings import Settings, SettingsError, parse

_OF_IMAGES, _OF_CLIPS = "emu3", "comment"
_USUAL = Sampling()


class Start(Settings):
    """A file that a clip begins with: an image to animate, or a clip to continue."""

    path: str
    digest: str
    """Of its bytes."""

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(path=str(path), digest=_digest(path))

    def find(self, beside: Path | None = None) -> Self:
        """The same file at its path, or at that path in the folder of ``beside``.

        Raises:
            ValueError: it is gone or has changed.
        """
        places = [Path(self.path)]
        places += [] if beside is None else [beside.parent / self.path]
        for path in filter(Path.is_file, places):
            if _digest(path) != self.digest:
                raise ValueError(f"generate: {path} must be as it was, it has changed")
            return Start(path=str(path), digest=self.digest)
        raise ValueError(f"generate: no file {self.path}, with which the clip began")


class Origin(Settings):
    """All that an image or clip depends on, beside the weights; None is the model's own default."""

    model_config = ConfigDict(title="generate")

    prompt: str = ""
    positive: str | None = None
    """Words after the prompt."""
    negative: str | None = None
    """The negative prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    guidance: float = _USUAL.guidance
    top_k: int | None = _USUAL.top_k
    top_p: float | None = _USUAL.top_p
    temperature: float = _USUAL.temperature
    ratio: str | None = None
    area: int | None = None
    """Pixels, about."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes that ratio and area, or the start, came to."""
    video: bool = False
    start: Start | None = None
    frames: PositiveInt | None = None
    """Frames of pixels of a clip, or of what follows the given one."""
    seconds: PositiveFloat | None = None
    """The same as a duration."""
    fps: Rate | None = None
    """Frames of pixels a second."""
    model: str = ""
    vision: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    weights: Literal["int8", "int4", "fp8"] | None = None
    """How linear layers are stored."""
    base: str | None = None
    """The model of a LoRA adapter."""
    window: PositiveInt = 1
    """Tokens of an image that a forward feeds; another gives the same image, up to near-ties."""
    fork: PositiveInt | None = None
    """Drafts of the next code in it."""
    version: str = ""
    """Of the program."""

    @model_validator(mode="after")
    def _of_a_clip(self) -> Self:
        about_clips = "start", "frames", "seconds", "fps"
        for name in () if self.video else about_clips:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for --video, --image and --continue")
        if self.frames is not None and self.seconds is not None:
            raise ValueError("frames or seconds must be given, got both")
        if self.start is not None and self.ratio is not None:
            raise ValueError("ratio is that of the given image or clip")
        return self

    def about(self) -> dict[str, str]:
        """The metadata of the file."""
        told = json.dumps(self.model_dump())
        if self.video:
            return {"title": self.prompt, _OF_CLIPS: told}
        return {"Description": self.prompt, "Software": f"emu3 {self.version}", _OF_IMAGES: told}


def read_origin(path: Path) -> dict[str, Any]:
    """The settings of an image or clip of :func:`emu3.tools.draw.draw`.

    Raises:
        ValueError: one line, for a file that cannot be read or has none.
    """
    about = read_about(path)
    try:
        tree = json.loads(about.get(_OF_IMAGES) or about[_OF_CLIPS])
        origin = parse(Origin, tree)
    except (KeyError, ValueError) as error:
        reason = f": {error}" if isinstance(error, SettingsError) else ""
        raise ValueError(f"--from: {path} has no settings of emu3 generate{reason}") from None
    if origin.start is not None:
        tree["start"] = origin.start.find(beside=path).model_dump()
    return tree


@cache
def program_version() -> str:
    try:
        return version("emu3-kernels")
    except PackageNotFoundError:  # run from a clone
        return "unreleased"


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()
