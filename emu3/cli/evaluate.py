"""``emu3 evaluate``."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from emu3.cli.common import (
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
from emu3.cli.files import Fps, vision_on
from emu3.settings import parse
from emu3.weights import load


@app.command()
def evaluate(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "--decoder",
            help="folder of a published model, or weights of a run; --images alone needs none",
        ),
    ] = None,
    vision: OwnVision = None,
    text: Annotated[
        Path | None, typer.Option(help="file or folder of Qwen's merges, if not in dashscope")
    ] = None,
    base: Base = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="images, videos and folders of them to reconstruct: PSNR and SSIM"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt", "tag"} or of GenEval, to generate')
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="what scores the images of --prompts: clip:FOLDER, hpsv2:FOLDER, "
            "aesthetic:FOLDER, damage:sharpness, damage:colourfulness or module:function"
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"question", "image" or "images" or "video", "answer"}'),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="token store, for perplexity")] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON file and the page")] = Path(
        "evaluation"
    ),
    count: Annotated[int, typer.Option(help="images of each prompt", min=1)] = 1,
    guidance: Annotated[float | None, typer.Option(help="of classifier-free guidance")] = None,
    temperature: Annotated[float | None, typer.Option(help="of the softmax")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample among this many codes")] = None,
    seed: Annotated[int, typer.Option(help="of the first image; it counts up", min=0)] = 0,
    area: Annotated[int | None, typer.Option(help="pixels of an image or frame, about")] = None,
    fps: Fps = None,
    lpips: Annotated[
        Path | None, typer.Option(help="safetensors of LPIPS over VGG16 or AlexNet")
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="folder of CLIP: Fréchet distance of --images and what is made"),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="of --store, evenly spread over it", min=1)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="of an answer", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="images or answers made together", min=1)] = 8,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of the decoder, if not the files'")] = None,
    weights: QuantizedWeights = None,
) -> None:
    """Measure a model: reconstruction, generation by judges, answers, and perplexity.

    What is measured is what inputs are given for. One JSON file and one page are written when all
    is done; the page needs no other file.
    """
    # Imported here: torchmetrics and PyAV are slow to import.
    from emu3.data.codes import Making
    from emu3.tools.evaluate.run import Asked, check, evaluate
    from emu3.tools.origin import Origin

    asked = Asked(
        images or (),
        prompts,
        judge or (),
        questions,
        store,
        origin=parse(Origin, _given(guidance, temperature, top_k, seed, area)),
        count=count,
        documents=documents,
        area=area,
        fps=None if fps is None else Fraction(parse(Making, {"fps": fps}).fps),
        lpips=lpips,
        clip=clip,
        max_tokens=max_tokens,
        batch=batch,
    )
    check(asked)
    needs_model = bool(prompts or questions or store)
    if model is None and (needs_model or vision is None):
        wanted = "--model" if needs_model else "--model or --vision"
        raise ValueError(f"evaluate: {wanted} must be given")
    loaded = None
    if model is not None:
        loaded = load(
            model,
            vision=vision or beside(model),
            text=text,
            device=usable(device),
            dtype=kind(dtype),
            weights=None if weights is None else weights.value,
            base=base,
        )
    tokenizer = vision_on(device, vision) if loaded is None else loaded.vision
    report = evaluate(str(model or vision), loaded, tokenizer, asked, out)
    _show(report)
    say(f"wrote {out / 'evaluation.json'} and {out / 'evaluation.html'}")
    if report.get("reconstruction", {}).get("failed_files"):
        raise typer.Exit(1)


def _given(guidance, temperature, top_k, seed, area) -> dict:
    """Settings of generation; those that are None keep their defaults."""
    options = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
        "area": area,
    }
    return {name: value for name, value in options.items() if value is not None}


def _show(report: dict) -> None:
    table = Table("measure", "value")
    reconstruction = report.get("reconstruction", {})
    for name, words in (("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("lpips", "LPIPS")):
        if name in reconstruction:
            table.add_row(words, f"{reconstruction[name]:.4g}")
    for name, words in (("reconstruction", "reconstructed"), ("generation", "generated")):
        if "frechet_clip" in report.get(name, {}):
            table.add_row(
                f"Fréchet distance by CLIP, {words}", f"{report[name]['frechet_clip']:.4g}"
            )
    for name, of in report.get("generation", {}).get("judges", {}).items():
        table.add_row(f"mean of {name}", f"{of['mean']:.4g}")
        if "choice_accuracy" in of:
            table.add_row(f"own prompt highest, {name}", f"{of['choice_accuracy']:.2%}")
    if "answers" in report:
        table.add_row("right answers", f"{report['answers']['accuracy']:.2%}")
    for name, of in report.get("perplexity", {}).items():
        if isinstance(of, dict):
            value = "none" if of["perplexity"] is None else f"{of['perplexity']:.4g}"
            table.add_row(f"perplexity, {name}", value)
    Console().print(table)
