"""``emu3 prefer``."""

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from emu3.cli.common import Device, Dtype, Model, OwnVision, app, kind, say, usable
from emu3.cli.files import MaxPixels, MinPixels
from emu3.model import Emu3
from emu3.settings import parse
from emu3.templates import grid_of
from emu3.weights import Pretrained, load, load_decoder

_ADAPTER = "adapter_config.json"
_SAMPLED = "samples", "seed", "guidance", "top_k", "top_p", "temperature", "positive", "negative"


class CombineName(str, Enum):
    mean = "mean"
    rank = "rank"


@app.command()
def prefer(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="a file of prompts, one a line, or .parquet files of Pick-a-Pic"),
    ],
    out: Annotated[Path, typer.Option(help="folder to fill, or to go on in")],
    model: Model,
    vision: OwnVision = None,
    voter: Annotated[
        list[str] | None, typer.Option(help="scores the images: aesthetic:FOLDER, module:function")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(help="votes of people on samples that are there, as JSON lines")
    ] = None,
    images: Annotated[
        bool, typer.Option("--images", help="write every sample as PNG, to vote on")
    ] = False,
    samples: Annotated[int, typer.Option(help="images of each prompt", min=2)] = 8,
    seed: Annotated[
        int, typer.Option(help="of the first image; it counts up", min=0, max=2**63 - 1)
    ] = 0,
    ratio: Annotated[str, typer.Option(help="width:height, such as 16:9")] = "1:1",
    area: Annotated[
        int | None, typer.Option(help="pixels of an image, about", show_default="the tokenizer's")
    ] = None,
    positive: Annotated[str, typer.Option(help="words after every prompt")] = "",
    negative: Annotated[str, typer.Option(help="negative prompt, with guidance")] = "",
    guidance: Annotated[
        float, typer.Option(help="scale of classifier-free guidance; 1 samples what is trained")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="sample among this many codes")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample among this softmax mass")] = None,
    temperature: Annotated[float, typer.Option(help="of the softmax")] = 1.0,
    combine: Annotated[
        CombineName, typer.Option(help="scores of the voters, or ranks if their scales differ")
    ] = CombineName.mean,
    gap: Annotated[
        float, typer.Option(help="leave out pairs whose scores differ by no more", min=0)
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="images that run together", min=1)] = 32,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of sampling; the reference: float32")] = None,
    min_pixels: MinPixels = 512 * 512,
    max_pixels: MaxPixels = 512 * 512,
) -> None:
    """Make pairs of images to train on, as codes: the best and the worst sample of each prompt.

    Images are sampled, scored by voters or people, and paired; or given pairs are encoded, once.
    The log-probabilities of the model are stored beside them, in float32: it is the reference, and
    the weights that "emu3 train dpo" starts from. A stopped run goes on where it was. Under
    torchrun each process takes its share.
    """
    if (model / _ADAPTER).exists():
        raise ValueError(f"--model: must be whole weights, got the adapter {model}: merge it first")
    tables = [path for path in inputs if path.suffix.lower() == ".parquet"]
    if (tables and len(tables) < len(inputs)) or (len(inputs) > 1 and not tables):
        raise ValueError("prefer: inputs must be one file of prompts, or .parquet files alone")
    of = _loaded(model, vision, _device(device), dtype)
    if tables:
        _encode(tables, out, of, {"min_pixels": min_pixels, "max_pixels": max_pixels})
        return
    sampled = {name: value for name, value in locals().items() if name in _SAMPLED}
    side = of.loaded.vision.settings
    how = {
        "grid": grid_of(ratio, area or side.image_size**2, side.spatial_factor),
        "combine": combine.value,
        "gap": gap,
        "batch": batch,
        "images": images,
    }
    _sample(inputs[0], out, of, sampled, how, voter or [], votes)


class _Of(NamedTuple):
    loaded: Pretrained
    decoder: str
    """Fingerprint of its weights."""
    reference: Callable[[], Emu3]
    """Gives the same in float32."""
    device: str


def _device(device: Device) -> str:
    """One GPU for each process of torchrun."""
    where = usable(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device is Device.cuda else where


def _loaded(model: Path, vision: Path | None, device: str, dtype: Dtype | None) -> _Of:
    # Imported here, as below: the command line starts without FSDP, PyAV and voters.
    from emu3.data.pairs import weights_fingerprint

    loaded = load(model, vision=vision, device=device, dtype=kind(dtype))

    def reference() -> Emu3:
        float32 = kind(Dtype.float32)
        if loaded.model.embedding.weight.dtype == float32:
            return loaded.model
        return load_decoder(model, device=device, dtype=float32)

    return _Of(loaded, weights_fingerprint(model), reference, device)


def _encode(tables: list[Path], out: Path, of: _Of, sizes: dict[str, int]) -> None:
    from emu3.data.codes import Making
    from emu3.tools.bulk import in_words
    from emu3.tools.prefer.given import encode_pairs

    how = {"decoder": of.decoder, "reference": of.reference}
    made = encode_pairs(tables, out, of.loaded, parse(Making, sizes), **how)
    for path, count in made.files.items():
        say(f"wrote {count:,} pairs to {path}")
    if made.left_out:
        say(f"left out: {in_words(made.left_out)}")
    if made.outcome.errors:
        raise typer.Exit(1)


def _sample(
    file: Path,
    out: Path,
    of: _Of,
    sampled: dict[str, Any],
    how: dict[str, Any],
    voters: list[str],
    votes: Path | None,
) -> None:
    from emu3.cli.generate import lines_of
    from emu3.data.pairs import Sampled
    from emu3.tools.prefer.run import PAIRS, Asked, prefer
    from emu3.tools.prefer.votes import read_votes
    from emu3.voters import load_voter

    asked = Asked(parse(Sampled, sampled), **how)
    prompts = lines_of(file)
    if not prompts:
        raise ValueError(f"prefer: {file} has no prompt")
    human = None if votes is None else read_votes(votes, len(prompts), asked.sampled.samples)
    known = {name: load_voter(name, of.device) for name in dict.fromkeys(voters)}
    given = {"decoder": of.decoder, "reference": of.reference, "human": human}
    made = prefer(prompts, out, of.loaded, known, asked, **given)
    if made.outcome.errors:
        raise typer.Exit(1)
    if made.pairs:
        say(f"wrote {made.pairs:,} pairs of {made.prompts:,} prompts to {out / PAIRS}")
    elif not (known or votes):
        say(f"sampled {made.prompts:,} prompts in {out}; vote with --voter or --votes")
