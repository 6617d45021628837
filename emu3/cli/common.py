"""The program, the options that commands share, and how they speak.

A user's error is one line on stderr and exit code 1, never a traceback.
"""

import sys
import warnings
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from emu3.tools.bulk import is_out_of_memory

_HELP = """Train Emu3-type models, generate and understand images and clips, and measure.

A user's error is one line on stderr and exit code 1, never a traceback.
"""


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
            say(f"emu3: {' '.join(str(error).split()) or type(error).__name__}", stderr=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_OneLine, help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[
    Path,
    typer.Option(
        "--model", "--decoder", help="folder of a published model, or decoder.safetensors of a run"
    ),
]
OwnVision = Annotated[
    Path | None, typer.Option("--vision", help="the same of the vision tokenizer, if elsewhere")
]


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


_DEMO = Path("demo/runs")
DECODER, VISION = _DEMO / "decoder/decoder.safetensors", _DEMO / "vision/vision.safetensors"


def say(line: str, *, stderr: bool = False) -> None:
    """Print verbatim: a path or a caption may look like markup or an emoji."""
    Console(stderr=stderr).print(line, markup=False, emoji=False, soft_wrap=True)


def beside(model: Path) -> Path | None:
    """The demo's vision tokenizer, for its decoder."""
    return VISION if model == DECODER else None


def kind(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype.value)


def usable(device: Device) -> str:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that PyTorch can use")
    return device.value
