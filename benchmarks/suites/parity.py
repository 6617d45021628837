"""Token parity: the share of codes that another precision or device changes, on real images."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.harness import machine, run
from emu3.data.media import IMAGES, read_image
from emu3.data.samples import sample_files
from emu3.vision import VisionTokenizer, preprocess
from emu3.weights import load_vision


def parity(
    vision: Annotated[Path, typer.Argument(help="A trained vision tokenizer, folder or file.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files; those in scikit-image."),
    ] = None,
    min_pixels: Annotated[int, typer.Option(help="As of emu3 prepare.")] = 512 * 512,
    max_pixels: Annotated[int, typer.Option(help="As of emu3 prepare.")] = 1024 * 1024,
) -> None:
    """Count the codes that differ from those of float32 on the CPU.

    In bfloat16 on the CPU, and on a GPU in float32, TF32 and bfloat16.
    """
    paths = images or [path for path in sample_files() if path.suffix.lower() in IMAGES]
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    pixels = [preprocess(read_image(path).permute(1, 2, 0), **bounds) for path in paths]
    table = Table(title=f"MEASURED: codes of {len(paths)} images that differ from float32, CPU")
    for column in ("device", "precision", "codes", "differ", "most in an image"):
        table.add_column(column, justify="right")
    for row in rows_of(load_vision(vision), pixels):
        shares = f"{row['share']:.3%}", f"{row['most']:.3%}"
        table.add_row(row["device"], row["precision"], f"{row['codes']:,}", *shares)
    run.console.print(table)
    run.console.print(machine.gpu() or machine.processor())


def rows_of(tokenizer: VisionTokenizer, images: list[Tensor]) -> list[dict]:
    """A row for every other way to compute the codes of ``images``, ``[3, H, W]`` each."""
    true = _codes(tokenizer, images, "cpu", "float32")
    ways = [("cpu", "bfloat16")]
    if torch.cuda.is_available():
        ways += [("cuda", precision) for precision in ("float32", "tf32", "bfloat16")]
    rows = []
    for device, precision in ways:
        found = _codes(tokenizer, images, device, precision)
        wrong = [(a != b).double().mean().item() for a, b in zip(true, found, strict=True)]
        sizes = [codes.numel() for codes in true]
        share = sum(w * n for w, n in zip(wrong, sizes, strict=True)) / sum(sizes)
        ways_row = {"device": device, "precision": precision, "codes": sum(sizes)}
        rows.append({**ways_row, "share": share, "most": max(wrong)})
    return rows


def _codes(
    tokenizer: VisionTokenizer, images: list[Tensor], device: str, precision: str
) -> list[Tensor]:
    tokenizer = tokenizer.to(device)
    tokenizer.allow_tf32 = precision == "tf32"
    tokenizer.compute_dtype = torch.bfloat16 if precision == "bfloat16" else None
    return [tokenizer.encode(image[None].to(device))[0].cpu() for image in images]
