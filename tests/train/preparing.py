"""What the tests of ``emu3 prepare`` share: small images, a tokenizer, and stores read back."""

import io
import json
from pathlib import Path

import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.store import Store
from emu3.prompt import Clip, parse_document
from emu3.vision import VisionTokenizer, preprocess
from emu3.weights import load_vision, save_vision
from tests.model.tiny import TINY_VISION
from tests.train.stores import TEXT

SMALL = ["--preset", "mini", "--min-pixels", "256", "--max-pixels", "1024"]
BOUNDS = {"min_pixels": 256, "max_pixels": 1024}
SPAN = 4


def save_tokenizer(path: Path) -> Path:
    """Write a vision tokenizer whose codes are latents of noise, so that images differ."""
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION).eval()
    noise = torch.rand(8, 4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = tokenizer.latents(noise).movedim(1, -1).flatten(0, -2)
        tokenizer.quantize.embedding.weight.copy_(latents[: TINY_VISION.num_codes])
    save_vision(path, tokenizer)
    return path


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randint(
        256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def codes_of(seed: int, weights: Path) -> torch.Tensor:
    pixels = preprocess(picture(seed).permute(1, 2, 0), **BOUNDS)
    return load_vision(weights).encode(pixels[None])[0]


def run(*words: object) -> object:
    return CliRunner().invoke(app, [str(word) for word in words])


def prepare(inputs: list[Path], out: Path, weights: Path | None, *more: object) -> object:
    vision = [] if weights is None else ["--vision", weights]
    return run("prepare", *inputs, "--out", out, *vision, *SMALL, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def parts_of(store: Store) -> list[list]:
    """Texts, codes as lists, and clips, of every document."""
    found = []
    for number in range(len(store)):
        shard, at = store.find(number)
        found.append(
            [
                part
                if isinstance(part, str)
                else (part.codes if isinstance(part, Clip) else part).tolist()
                for part in parse_document(shard.ids(at).tolist(), TEXT, SPAN)
            ]
        )
    return found


def jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
