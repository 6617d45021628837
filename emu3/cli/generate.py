"""``emu3 generate``."""

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from emu3.cli.common import (
    DECODER,
    Base,
    Device,
    Dtype,
    OwnVision,
    QuantizedWeights,
    app,
    beside,
    kind,
    say,
    usable,
)
from emu3.data.media import open_video, read_image
from emu3.settings import parse
from emu3.templates import grid_of
from emu3.tools.draw import draw, plan
from emu3.tools.look import is_video
from emu3.tools.origin import Origin, Start, read_origin
from emu3.weights import load


def _setting(name: str, words: str, *names: str, **extra: Any) -> Any:
    """An option that is None unless it is given, and has its default in ``Origin``."""
    default = Origin.model_fields[name].default
    shown = False if default is None else str(getattr(default, "value", default))
    return typer.Option(*names, help=words, show_default=shown, **extra)


@app.command()
def generate(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPTS]...", help='such as "a red seven"')
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a file of prompts, one a line, in UTF-8")
    ] = None,
    count: Annotated[int, typer.Option(help="images of each prompt")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="file that ends in .png or .mp4, or folder of several, which are numbered",
            show_default="generated.png, generated.mp4 or generated",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="repeat this image or clip, but for what else is given"),
    ] = None,
    ratio: Annotated[str | None, _setting("ratio", "width:height, such as 16:9")] = None,
    area: Annotated[int | None, _setting("area", "pixels of an image or frame, about")] = None,
    negative: Annotated[str | None, _setting("negative", "negative prompt")] = None,
    positive: Annotated[str | None, _setting("positive", "words after every prompt")] = None,
    guidance: Annotated[
        float | None, _setting("guidance", "scale of classifier-free guidance")
    ] = None,
    top_k: Annotated[int | None, _setting("top_k", "sample among this many codes")] = None,
    top_p: Annotated[float | None, _setting("top_p", "sample among this softmax mass")] = None,
    temperature: Annotated[float | None, _setting("temperature", "of the softmax")] = None,
    seed: Annotated[
        int | None,
        _setting("seed", "of the first image; it counts up", min=0, max=2**64 - 1),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="generate clips")] = False,
    image: Annotated[Path | None, typer.Option(help="image that a clip begins with")] = None,
    clip: Annotated[
        Path | None, typer.Option("--continue", help="clip that goes on in a longer one")
    ] = None,
    seconds: Annotated[
        float | None, _setting("seconds", "of a clip, or of what follows the given one")
    ] = None,
    frames: Annotated[int | None, _setting("frames", "the same in frames")] = None,
    fps: Annotated[str | None, _setting("fps", "frames per second of a clip")] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="write files as they grow too")
    ] = False,
    batch: Annotated[int, typer.Option(help="images that are generated together")] = 4,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "--decoder",
            help="folder of a published model, or decoder.safetensors of a run",
            show_default=str(DECODER),
        ),
    ] = None,
    vision: OwnVision = None,
    device: Annotated[Device | None, _setting("device", "device to run on")] = None,
    dtype: Annotated[Dtype | None, _setting("dtype", "of the decoder")] = None,
    weights: QuantizedWeights = None,
    base: Base = None,
    window: Annotated[
        int | None,
        _setting("window", "tokens of a forward, up to 64; the image is the same"),
    ] = None,
    fork: Annotated[
        int | None, _setting("fork", "drafts of the next code in a window, by default a quarter")
    ] = None,
) -> None:
    """Generate an image or a clip from each prompt.

    A published model is given Emu3's own words after every prompt and as the negative prompt,
    unless others are given. Every file tells its prompt, seed and settings; --from repeats it.
    """
    given = {name: value for name, value in locals().items() if name in Origin.model_fields}
    _check_counts(count=count, batch=batch)
    asked = _asked(given, source, _start(image, clip))
    told = _prompts(words, prompts, asked, may_be_none=asked.video or source is not None)
    paths = _targets(out, len(told) * count, ".mp4" if asked.video else ".png")
    types = {
        "device": usable(Device(asked.device)),
        "dtype": kind(asked.dtype and Dtype(asked.dtype)),
        "weights": asked.weights,
        "base": asked.base,
    }
    loaded = load(asked.model, vision=asked.vision, **types)
    made = plan(asked, loaded)
    files = [
        (path, made.origin.model_copy(update={"prompt": one, "seed": (asked.seed + i) % 2**64}))
        for i, (path, one) in enumerate(
            zip(paths, (one for one in told for _ in range(count)), strict=True)
        )
    ]
    for path, codes in draw(loaded, made, files, batch=batch, preview=preview):
        say(f"wrote {path}" + f", {codes:.2f} codes a forward" * (asked.window > 1))


def _check_counts(**counts: int) -> None:
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"--{name}: must be at least 1, got {number}")


def _asked(given: Mapping[str, Any], source: Path | None, start: Start | None) -> Origin:
    """What the options say, and beside them the file that is repeated."""
    tree: dict[str, Any] = {"model": str(DECODER)} if source is None else read_origin(source)
    said = {
        name: str(getattr(value, "value", value)) if isinstance(value, Path | Enum) else value
        for name, value in given.items()
        if value is not None and value is not False
    }
    if "model" in said:
        tree |= {"vision": None, "dtype": None, "weights": None, "base": None}
    if "seconds" in said:
        tree["frames"] = None
    if start is not None:
        said |= {"start": start, "video": True}
    asked = parse(Origin, tree | said)
    if asked.ratio is not None:
        grid_of(asked.ratio)  # to tell a wrong one before gigabytes are read
    if asked.vision is None and (vision := beside(Path(asked.model))):
        return asked.model_copy(update={"vision": str(vision)})
    return asked


def _start(image: Path | None, clip: Path | None) -> Start | None:
    """What a clip begins with; it must be readable before gigabytes are read."""
    if image is not None and clip is not None:
        raise ValueError("--image: must be without --continue")
    path = image or clip
    if path is None:
        return None
    if is_video(path) != (image is None):
        kind = "a video for --continue" if image is None else "an image for --image"
        raise ValueError(f"generate: {path} must be {kind}")
    (read_image if image else open_video)(path)
    return Start.of(path)


def _prompts(
    words: list[str] | None, file: Path | None, asked: Origin, *, may_be_none: bool
) -> list[str]:
    """The prompts in their order; without any, that of the file which is repeated."""
    if words and file is not None:
        raise ValueError("--prompts: must be without prompts beside it")
    found = words if file is None else lines_of(file)
    if not found:
        if file is not None or not may_be_none:
            none = "generate: a prompt must be given"
            raise ValueError(none if file is None else f"--prompts: {file} has no prompt")
        return [asked.prompt]
    empty = [one for one in found if not one.strip()]
    if empty:
        raise ValueError(f"generate: a prompt must have words, got {empty[0]!r}")
    return found


def lines_of(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {file} must be UTF-8 text: {error}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _targets(out: Path | None, number: int, suffix: str) -> list[Path]:
    """Where each image or clip goes; what cannot be written is told before the work."""
    if number == 1:
        path = out or Path(f"generated{suffix}")
        if path.suffix.lower() != suffix:
            raise ValueError(f"--out: must be a file that ends in {suffix}, got {str(path)!r}")
        if path.is_dir():
            raise ValueError(f"--out: must be a file, got the folder {path}")
        folder, paths = path.parent, [path]
    else:
        folder = out or Path("generated")
        if folder.suffix.lower() in (".png", ".mp4"):
            raise ValueError(f"--out: must be a folder for {number} files, got {folder}")
        paths = [folder / f"{i:04d}{suffix}" for i in range(1, number + 1)]
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"--out: {there} must be a folder that can be written to")
    return paths
