"""``emu3 tokenize | detokenize | convert``."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import VISION, Device, Dtype, app, kind, say, usable
from emu3.config import parse
from emu3.tools.bulk import Outcome, in_words
from emu3.vision import VisionTokenizer
from emu3.weights import load, load_vision, save

Vision = Annotated[Path, typer.Option(help="vision.safetensors of a run, or a published folder")]
Overwrite = Annotated[bool, typer.Option(help="make files again that are there")]


class Clips(str, Enum):
    pieces = "pieces"
    stream = "stream"


MinPixels = Annotated[int, typer.Option(help="smaller images are upscaled to about this area")]
MaxPixels = Annotated[int, typer.Option(help="larger images are downscaled to about this area")]
Fps = Annotated[
    str | None, typer.Option(help="frames per second of videos: 12, 29.97, 30000/1001; or all")
]
HowClips = Annotated[
    Clips, typer.Option(help="encode every 4 frames independently, or as one stream")
]


class LayoutName(str, Enum):
    official = "official"
    hub = "hub"
    runtime = "runtime"


@app.command()
def tokenize(
    inputs: Annotated[list[Path], typer.Argument(help="images, videos, and folders of them")],
    out: Annotated[Path, typer.Option(help="folder of the codes")],
    vision: Vision = VISION,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    min_pixels: MinPixels = 512 * 512,
    max_pixels: MaxPixels = 1024 * 1024,
    fps: Fps = None,
    clips: HowClips = Clips.pieces,
    compare: Annotated[
        Path | None,
        typer.Option(help="folder of originals beside reconstructions, with PSNR and SSIM"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Encode images and videos; those that have their codes are skipped.

    A file that fails is told in one line and the others go on; the exit code is then 1. Hidden
    files are left out, other kinds counted. Under torchrun each process takes its share.
    """
    # Imported here, as below: PyAV is slow to import.
    from emu3.data.codes import Making
    from emu3.tools.tokenize import tokenize

    how = {"min_pixels": min_pixels, "max_pixels": max_pixels, "fps": fps, "clips": clips.value}
    making, tokenizer = parse(Making, how), vision_on(device, vision)
    _summarise(tokenize(inputs, out, tokenizer, making, compare=compare, overwrite=overwrite), out)


@app.command()
def detokenize(
    inputs: Annotated[list[Path], typer.Argument(help="files of codes, and folders of them")],
    out: Annotated[Path, typer.Option(help="folder of the images and videos")],
    vision: Vision = VISION,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    original_size: Annotated[bool, typer.Option(help="resize to the size of the source")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Decode codes into PNG and MP4; files newer than their codes are skipped.

    A file that fails is told in one line and the others go on; the exit code is then 1.
    """
    from emu3.tools.tokenize import detokenize

    tokenizer, resized = vision_on(device, vision), {"original_size": original_size}
    _summarise(detokenize(inputs, out, tokenizer, overwrite=overwrite, **resized), out)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="folder of a published model, in any layout")],
    out: Annotated[Path, typer.Argument(help="folder to fill")],
    layout: Annotated[
        LayoutName,
        typer.Option(help="official, or Hugging Face's: of its hub, or as its classes save"),
    ],
    vision: Annotated[
        Path | None, typer.Option(help="folder or file of the vision tokenizer, if it is elsewhere")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="file or folder of Qwen's merges, if they are elsewhere")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="of the decoder; by default that of the files")
    ] = None,
) -> None:
    """Write a model in another layout, with what others need to read it."""
    save(out, load(model, vision=vision, text=text, dtype=kind(dtype)), layout.value)
    say(f"wrote {out}")


def vision_on(device: Device, path: Path) -> VisionTokenizer:
    """One GPU per rank of torchrun."""
    where = usable(device)
    if device is Device.cuda:
        where = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return load_vision(path).to(where)


def _summarise(outcome: Outcome, out: Path) -> None:
    failed = f", {len(outcome.errors)} failed" if outcome.errors else ""
    others = f"; passed over {in_words(outcome.passed_over)}" if outcome.passed_over else ""
    say(f"{outcome.done} files written, {outcome.skipped} skipped{failed}, in {out}{others}")
    if failed:
        raise typer.Exit(1)
