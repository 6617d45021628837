"""``emu3 prepare | store``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import Device, app, say
from emu3.cli.files import (
    Clips,
    Fps,
    HowClips,
    MaxPixels,
    MinPixels,
    Overwrite,
    vision_on,
)
from emu3.config import EMU3_VOCABULARY, load_model, parse
from emu3.text import ByteTokenizer, QwenTokenizer, TextTokenizer


@app.command()
def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="folders, .jsonl, .json, .tar and .parquet files"),
    ],
    out: Annotated[Path, typer.Option(help="folder of the token store")],
    vision: Annotated[
        Path | None, typer.Option(help="vision.safetensors of a run, or a published folder")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="file or folder of Qwen's merges, if not in dashscope")
    ] = None,
    preset: Annotated[str, typer.Option(help="whose vocabulary: 8b or mini")] = "8b",
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    min_pixels: MinPixels = 512 * 512,
    max_pixels: MaxPixels = 1024 * 1024,
    fps: Fps = None,
    clips: HowClips = Clips.pieces,
    documents: Annotated[int, typer.Option(help="samples of a shard, about", min=1)] = 16384,
    overwrite: Overwrite = False,
) -> None:
    """Turn images, videos, texts and conversations into a token store for training.

    A shard is three files that appear when it is whole; those that are there are skipped, so a
    stopped run continues and a store grows. A sample that fails is told in one line and left out;
    the exit code is then 1. Under torchrun each process makes its share of the shards.
    """
    # Imported here: PyAV is slow to import.
    from emu3.data.codes import Making
    from emu3.data.store import Store
    from emu3.tools.prepare.run import prepare

    how = {"min_pixels": min_pixels, "max_pixels": max_pixels, "fps": fps, "clips": clips.value}
    making, words = parse(Making, how), _text_of(preset, text)
    tokenizer = None if vision is None else vision_on(device, vision)
    made, left_out = prepare(
        inputs, out, words, tokenizer, making, size=documents, overwrite=overwrite
    )
    failed = f", {len(made.errors)} failed" if made.errors else ""
    lacking = f"; {len(left_out)} samples left out" if left_out else ""
    say(f"{made.done} shards written, {made.skipped} skipped{failed}{lacking}, in {out}")
    if int(os.environ.get("RANK", 0)) == 0 and (made.done or made.skipped):
        say(_totals(Store(out)))
    if failed or lacking:
        raise typer.Exit(1)


@app.command()
def store(
    folder: Annotated[Path, typer.Argument(help="folder of a token store")],
    verify: Annotated[bool, typer.Option(help="read every byte and compare its hashes")] = False,
    tars: Annotated[
        Path | None, typer.Option(help="folder to fill with WebDataset tars, one for each shard")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="state how full rows of this context become", min=256)
    ] = None,
    window: Annotated[int, typer.Option(help="documents that are packed together", min=1)] = 4096,
    score: Annotated[
        Path | None, typer.Option(help=".npy file to write: a score of each document's image")
    ] = None,
    voter: Annotated[
        list[str] | None, typer.Option(help="what scores, with --score; several are averaged")
    ] = None,
    vision: Annotated[
        Path | None, typer.Option(help="vision tokenizer of the store, with --score")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="file or folder of Qwen's merges, if not in dashscope")
    ] = None,
    device: Annotated[Device, typer.Option(help="device to score on")] = Device.cpu,
) -> None:
    """State what a token store holds; check it, export it, score it, or try how it packs."""
    from emu3.data.store import Store
    from emu3.tools.prepare.export import export_tars
    from emu3.tools.prepare.fill import fill_of

    found = Store(folder)
    say(_totals(found))
    if verify:
        for shard in found.shards:
            shard.verify()
        say(f"{len(found.shards)} shards are as they were written")
    if context is not None:
        say(fill_of(found, context, window))
    if tars is not None:
        say(f"wrote {len(export_tars(found, tars))} tars to {tars}")
    if score is not None:
        _score(found, score, voter or [], vision, _text_of(_preset_of(found), text), device)
    elif voter or vision:
        raise ValueError("store: --voter and --vision go with --score")


def _score(
    found, path: Path, names: list[str], vision: Path | None, text: TextTokenizer, device: Device
) -> None:
    import numpy as np

    from emu3.files import replacing
    from emu3.tools.score import score_store
    from emu3.voters import load_voter

    if path.suffix != ".npy" or not names or vision is None:
        raise ValueError("store: --score must end in .npy, with a --voter and a --vision")
    voters = [load_voter(name, device.value) for name in names]
    scores = score_store(found, vision_on(device, vision), text, voters)
    with replacing(path) as draft, draft.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    say(f"wrote {int((~np.isnan(scores)).sum()):,} scores to {path}")


def _preset_of(found) -> str:
    return "8b" if found.vocabulary == EMU3_VOCABULARY else "mini"


def _text_of(preset: str, text: Path | None) -> TextTokenizer:
    vocabulary = load_model(preset).vocabulary
    return QwenTokenizer(text) if vocabulary == EMU3_VOCABULARY else ByteTokenizer(vocabulary)


def _totals(found) -> str:
    left_out = sum(shard.header.left_out for shard in found.shards)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds().items() if count)
    lacking = f"; {left_out:,} samples were left out" if left_out else ""
    return (
        f"{len(found):,} documents ({kinds}), {found.tokens:,} tokens, "
        f"{len(found.shards)} shards in {found.folder}{lacking}"
    )
