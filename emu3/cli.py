"""The command line: ``emu3 demo | redraw | train | generate | chat | tokenize | profile`` and more.

A user's error is one line on stderr and exit code 1, never a traceback.
"""

import os
import sys
import warnings
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.core import TyperGroup

from emu3.config import load_model, parse
from emu3.files import replacing
from emu3.generate import Sampling, generate_images, generate_text
from emu3.prompt import content_ids
from emu3.tasks import load_recipe
from emu3.tasks import train as train_recipe
from emu3.templates import DESCRIBE, NEGATIVE, POSITIVE, Turn, chat_prompt, grid_of
from emu3.text import QwenTokenizer
from emu3.tools.bulk import Outcome, in_words, is_out_of_memory
from emu3.vision import VisionTokenizer, postprocess, preprocess
from emu3.weights import load, load_vision, save


class _OneLine(TyperGroup):
    """Prints a user's error as one line."""

    def main(self, *args, **extra):
        # A caption, a name or a help text may have characters that the terminal lacks.
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF data, which costs nothing
        return super().main(*args, **extra)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            is_users = isinstance(error, ValueError | NotImplementedError | OSError)
            if not (is_users or is_out_of_memory(error)):
                raise
            _say(f"emu3: {' '.join(str(error).split()) or type(error).__name__}", stderr=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_OneLine, help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[
    Path,
    typer.Option(
        "--model", "--decoder", help="folder of a published model, or decoder.safetensors of a run"
    ),
]
Vision = Annotated[Path, typer.Option(help="vision.safetensors of a run, or a published folder")]
OwnVision = Annotated[
    Path | None, typer.Option("--vision", help="the same of the vision tokenizer, if elsewhere")
]
Overwrite = Annotated[bool, typer.Option(help="make files again that are there")]


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Clips(str, Enum):
    pieces = "pieces"
    stream = "stream"


class LayoutName(str, Enum):
    official = "official"
    hub = "hub"
    runtime = "runtime"


_DEMO = Path("demo/runs")
_DECODER, _VISION = _DEMO / "decoder/decoder.safetensors", _DEMO / "vision/vision.safetensors"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("demo"),
    video: Annotated[
        bool, typer.Option("--video", help="moving digits too: generate and continue clips, answer")
    ] = False,
) -> None:
    """Train the miniature on handwritten digits, generate, caption, and report."""
    # Imported here: matplotlib is slow to import and no other command needs it.
    from emu3.demo.run import run_demo

    run_demo(out, video=video)


@app.command()
def redraw(
    overrides: Annotated[list[str] | None, typer.Argument(help="settings as key=value")] = None,
    recipe: Annotated[str, typer.Option(help="a TOML file, or a recipe that ships")] = "tokenizer",
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("demo/tokenizer"),
) -> None:
    """Train a vision tokenizer, reconstruct validation files, and report PSNR and SSIM."""
    from emu3.demo.redraw import run_redraw

    run_redraw(out, recipe, overrides or ())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a TOML file, or a recipe that ships: digits …")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings as key=value")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/new"),
    resume: Annotated[bool, typer.Option(help="continue from the last checkpoint")] = False,
) -> None:
    """Train from a recipe."""
    weights = train_recipe(load_recipe(recipe, overrides or ()), out, resume=resume)
    _say(f"wrote {weights}")


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(help='such as "a red seven"')],
    model: Model = _DECODER,
    vision: OwnVision = None,
    out: Annotated[Path, typer.Option(help="PNG file: all images side by side")] = Path(
        "generated.png"
    ),
    ratio: Annotated[str | None, typer.Option(help="width:height, such as 16:9")] = None,
    area: Annotated[int | None, typer.Option(help="pixels of an image, about")] = None,
    negative: Annotated[str | None, typer.Option(help="negative prompt")] = None,
    positive: Annotated[str | None, typer.Option(help="words after every caption")] = None,
    guidance: Annotated[float, typer.Option(help="scale of classifier-free guidance")] = 3.0,
    top_k: Annotated[int, typer.Option(help="sample among this many codes")] = 2048,
    top_p: Annotated[float | None, typer.Option(help="sample among this softmax mass")] = None,
    temperature: Annotated[float, typer.Option(help="of the softmax")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the first image", min=0, max=2**64 - 1)] = 0,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of the decoder")] = None,
) -> None:
    """Generate an image from each caption.

    Emu3's own words stand after every caption and as the negative prompt, unless others are given.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: must be a file that ends in .png, got {str(out)!r}")
    vision = _beside(model) if vision is None else vision
    loaded = load(model, vision=vision, device=_usable(device), dtype=_kind(dtype))
    published = isinstance(loaded.text, QwenTokenizer)
    negative = negative if negative is not None else NEGATIVE if published else ""
    positive = positive if positive is not None else POSITIVE if published else ""
    size, factor = loaded.vision.settings.image_size, loaded.vision.settings.spatial_factor
    area = area if area is not None else 720 * 720 if published else size * size
    grid = grid_of(ratio or "1:1", area, factor)
    how = Sampling(guidance, top_k, top_p, temperature, negative)
    asked = [words + positive for words in captions]
    codes = generate_images(loaded.model, loaded.text, asked, grid, how, seed)
    strip = torch.cat(list(loaded.vision.decode(codes)), dim=2)
    with replacing(out) as draft:
        postprocess(strip)[0].save(draft, format="PNG")
    _say(f"wrote {out}")


@app.command()
def chat(
    images: Annotated[list[Path], typer.Argument(help="image files, in the order meant")],
    ask: Annotated[
        str | None, typer.Option(help="one question about all of them; without it, captions")
    ] = None,
    model: Model = _DECODER,
    vision: OwnVision = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="of an answer, at most; by default 1024, or what fits", min=1)
    ] = None,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of the decoder")] = None,
) -> None:
    """Caption images, or answer a question about them.

    A published model is asked to describe each image, in Emu3's own prompt.
    """
    vision = _beside(model) if vision is None else vision
    loaded = load(model, vision=vision, device=_usable(device), dtype=_kind(dtype))
    published = isinstance(loaded.text, QwenTokenizer)
    size = None if published else loaded.vision.settings.image_size
    codes = [loaded.vision.encode(_read(path, size).to(device.value)[None])[0] for path in images]
    ids, text = loaded.text.vocabulary, loaded.text
    if ask is not None:
        prompts, names = [chat_prompt([Turn([*codes, ask])], text)], [ask]
    elif published:
        prompts, names = [chat_prompt([Turn([one, DESCRIBE])], text) for one in codes], images
    else:
        prompts, names = [[ids.bos, *content_ids([one], text)] for one in codes], images
    room = loaded.model.settings.max_position_embeddings + 1 - max(map(len, prompts))
    answers = generate_text(loaded.model, text, prompts, max_tokens or min(1024, max(1, room)))
    for name, words in zip(names, answers, strict=True):
        _say(f"{name}: {words}")


@app.command()
def tokenize(
    inputs: Annotated[list[Path], typer.Argument(help="images, videos, and folders of them")],
    out: Annotated[Path, typer.Option(help="folder of the codes")],
    vision: Vision = _VISION,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    min_pixels: Annotated[
        int, typer.Option(help="smaller images are upscaled to about this area")
    ] = 512 * 512,
    max_pixels: Annotated[
        int, typer.Option(help="larger images are downscaled to about this area")
    ] = 1024 * 1024,
    fps: Annotated[
        str | None, typer.Option(help="frames per second of videos: 12, 29.97, 30000/1001; or all")
    ] = None,
    clips: Annotated[
        Clips, typer.Option(help="encode every 4 frames independently, or as one stream")
    ] = Clips.pieces,
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
    making, tokenizer = parse(Making, how), _vision_on(device, vision)
    _summarise(tokenize(inputs, out, tokenizer, making, compare=compare, overwrite=overwrite), out)


@app.command()
def detokenize(
    inputs: Annotated[list[Path], typer.Argument(help="files of codes, and folders of them")],
    out: Annotated[Path, typer.Option(help="folder of the images and videos")],
    vision: Vision = _VISION,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    original_size: Annotated[bool, typer.Option(help="resize to the size of the source")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Decode codes into PNG and MP4; files newer than their codes are skipped.

    A file that fails is told in one line and the others go on; the exit code is then 1.
    """
    from emu3.tools.tokenize import detokenize

    tokenizer, resized = _vision_on(device, vision), {"original_size": original_size}
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
    save(out, load(model, vision=vision, text=text, dtype=_kind(dtype)), layout.value)
    _say(f"wrote {out}")


@app.command()
def profile(
    overrides: Annotated[list[str] | None, typer.Argument(help="such as num_layers=2")] = None,
    preset: Annotated[str, typer.Option(help="shape of the model: 8b or mini")] = "8b",
    context: Annotated[int, typer.Option(help="tokens of the longest decode", min=1)] = 131072,
    prefill: Annotated[int, typer.Option(help="tokens of the longest prompt", min=1)] = 8192,
    against: Annotated[str | None, typer.Option(help="attention backend to compare with")] = None,
    dtype: Annotated[Dtype, typer.Option(help="of weights and cache")] = Dtype.bfloat16,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("profile"),
) -> None:
    """Profile a prefill and a decode by op, with random weights."""
    # Imported here: matplotlib is slow to import.
    from emu3.tools.profile.report import write_report
    from emu3.tools.profile.run import run_profile

    found = run_profile(
        load_model(preset, overrides or ()),
        context=context,
        prefill=prefill,
        out=out,
        against=against,
        dtype=getattr(torch, dtype.value),
        device=_usable(device),
    )
    write_report(found, out)
    _say(f"wrote {out}/profile.md, profile.json, time_per_token.png and trace.json")


def _say(line: str, *, stderr: bool = False) -> None:
    """Print verbatim: a path or a caption may look like markup or an emoji."""
    Console(stderr=stderr).print(line, markup=False, emoji=False, soft_wrap=True)


def _beside(model: Path) -> Path | None:
    """The demo's vision tokenizer, for its decoder."""
    return _VISION if model == _DECODER else None


def _kind(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype.value)


def _usable(device: Device) -> str:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that PyTorch can use")
    return device.value


def _vision_on(device: Device, path: Path) -> VisionTokenizer:
    """One GPU per rank of torchrun."""
    where = _usable(device)
    if device is Device.cuda:
        where = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return load_vision(path).to(where)


def _summarise(outcome: Outcome, out: Path) -> None:
    failed = f", {len(outcome.errors)} failed" if outcome.errors else ""
    others = f"; passed over {in_words(outcome.passed_over)}" if outcome.passed_over else ""
    _say(f"{outcome.done} files written, {outcome.skipped} skipped{failed}, in {out}{others}")
    if failed:
        raise typer.Exit(1)


def _read(path: Path, size: int | None) -> Tensor:
    """Pixels ``[3, H, W]``: a square of ``size``, or None: as Emu3's image processor resizes."""
    from emu3.data.media import read_image

    image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    if size is None:
        return preprocess(image)
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
