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


# An unknown option and the like; typer exports the subclass alone.
_UsageError = typer.BadParameter.__mro__[1]


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
        except _UsageError as error:
            say(f"emu3 {ctx.invoked_subcommand}: {_one_line(error.format_message())}", stderr=True)
            raise typer.Exit(2) from None
        except Exception as error:
            if not is_users(error):
                raise
            tell_error(error)
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
Base = Annotated[
    Path | None, typer.Option(help="the model of a LoRA adapter, if it lies elsewhere than it says")
]


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class WeightsName(str, Enum):
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


_DEMO = Path("demo/runs")
DECODER, VISION = _DEMO / "decoder/decoder.safetensors", _DEMO / "vision/vision.safetensors"


def is_users(error: Exception) -> bool:
    """Whether an error is told in a line; another one is a bug."""
    return isinstance(error, ValueError | NotImplementedError | OSError) or is_out_of_memory(error)


def tell_error(error: Exception) -> None:
    say(f"emu3: {_one_line(str(error)) or type(error).__name__}", stderr=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def say(line: str, *, stderr: bool = False) -> None:
    """Print verbatim: a path or a caption may look like markup or an emoji."""
    Console(stderr=stderr).print(line, markup=False, emoji=False, soft_wrap=True)


def beside(model: Path) -> Path | None:
    """The demo's vision tokenizer, for its decoder."""
    return VISION if model == DECODER else None


def kind(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype.value)


QuantizedWeights = Annotated[
    WeightsName | None,
    typer.Option("--weights", help="store linear layers in 8 or 4 bits; fp8 needs torchao, a GPU"),
]


def usable(device: Device) -> str:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that PyTorch can use")
    return device.value
