"""``emu3 generate | chat``."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from emu3.cli.common import DECODER, Device, Dtype, Model, OwnVision, app, beside, kind, say, usable
from emu3.files import replacing
from emu3.generate import Sampling, generate_images, generate_text
from emu3.prompt import content_ids
from emu3.templates import DESCRIBE, NEGATIVE, POSITIVE, Turn, chat_prompt, grid_of
from emu3.text import QwenTokenizer
from emu3.vision import postprocess, preprocess
from emu3.weights import load


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(help='such as "a red seven"')],
    model: Model = DECODER,
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
    vision = beside(model) if vision is None else vision
    loaded = load(model, vision=vision, device=usable(device), dtype=kind(dtype))
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
    say(f"wrote {out}")


@app.command()
def chat(
    images: Annotated[list[Path], typer.Argument(help="image files, in the order meant")],
    ask: Annotated[
        str | None, typer.Option(help="one question about all of them; without it, captions")
    ] = None,
    model: Model = DECODER,
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
    vision = beside(model) if vision is None else vision
    loaded = load(model, vision=vision, device=usable(device), dtype=kind(dtype))
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
        say(f"{name}: {words}")


def _read(path: Path, size: int | None) -> Tensor:
    """Pixels ``[3, H, W]``: a square of ``size``, or None: as Emu3's image processor resizes."""
    from emu3.data.media import read_image

    image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    if size is None:
        return preprocess(image)
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
