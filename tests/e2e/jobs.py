"""The runs that a kill test breaks off, and the points inside them at which they die."""

import fcntl
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Runs import some of these late: once here, before the fork.
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo

from emu3.config import BYTE_VOCABULARY, Recipe
from emu3.data.codes import Making
from emu3.data.media import write_image
from emu3.demo import run as demo
from emu3.tasks import train
from emu3.text import ByteTokenizer
from emu3.tools import compare  # noqa: F401
from emu3.tools.prepare.run import prepare as prepare_store
from emu3.tools.tokenize import detokenize, tokenize
from emu3.train import checkpoint
from emu3.train.metrics import Metrics
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, read_tensors, save_vision
from tests.train.recipes import DECODER_WORDS, VISION_WORDS, tiny_recipe

Run = Callable[[Path], None]
"""Starts a run in a folder, or continues it, as a user would."""

CLOCKED = {
    "seconds",
    "fused_speedup",
    "training_tokens_per_second",
    "generated_tokens_per_second",
}
"""Entries of the demo's report that depend on the clock."""


class Event(NamedTuple):
    """The ``number``-th change of the disk or logged step."""

    number: int
    after: bool
    torn: bool = False
    """Half of the file that is written is lost."""


def prepare(folder: Path) -> dict[str, Run]:
    """Write what the runs read; return them by name."""
    recipes = {}
    for stage in ("vision", "tokenizer", "decoder"):
        recipes[stage] = tiny_recipe(stage, folder / stage)
    runs: dict[str, Run] = {name: partial(_train, recipe) for name, recipe in recipes.items()}
    inputs, weights = folder / "inputs", folder / "tokenizer.safetensors"
    random = torch.Generator().manual_seed(0)
    for number in range(6):
        image = torch.randint(256, (3, 24, 32), generator=random).byte()
        write_image(inputs / f"{number}.png", image)
    shutil.copy(folder / "tokenizer" / "moving.mp4", inputs)
    torch.manual_seed(0)
    save_vision(weights, VisionTokenizer(recipes["tokenizer"].vision))
    _tokenize(inputs, weights, folder / "made")
    runs["tokenize"] = partial(_tokenize, inputs, weights)
    runs["detokenize"] = partial(_detokenize, folder / "made" / "codes", weights)
    runs["prepare"] = partial(_prepare, inputs, weights)
    runs["demo"] = _demo
    return runs


def _train(recipe: Recipe, out: Path) -> None:
    train(recipe, out, resume=(out / checkpoint.FILE).exists())


def _tokenize(inputs: Path, weights: Path, out: Path) -> None:
    making = Making(min_pixels=64, max_pixels=4096)
    tokenize([inputs], out / "codes", load_vision(weights), making, compare=out / "compared")


def _detokenize(codes: Path, weights: Path, out: Path) -> None:
    detokenize([codes], out, load_vision(weights))


def _prepare(inputs: Path, weights: Path, out: Path) -> None:
    tokenizer = load_vision(weights)
    codes = {"num_visual": tokenizer.settings.num_codes}
    text = ByteTokenizer(BYTE_VOCABULARY.model_copy(update=codes))
    making = Making(min_pixels=64, max_pixels=4096)
    prepare_store([inputs], out / "store", text, tokenizer, making, size=2)


def _demo(out: Path) -> None:
    """The demo with a quarter of its images; its plots, which take most of it, are black."""
    demo._ROUNDS = 1
    for name in ("draw_grid", "draw_reconstructions", "draw_captions", "draw_curves"):
        setattr(demo.plots, name, lambda path, *_: write_image(path, torch.zeros(3, 8, 8).byte()))
    demo.run_demo(out, VISION_WORDS, DECODER_WORDS)


def live(run: Run, out: Path, log: Path, death: Event | None) -> int:
    """Run, and die at an event; return the number of all events."""
    shown = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    events = _count_events(death)
    run(out)
    return events()


def _count_events(death: Event | None) -> Callable[[], int]:
    """Count the changes of the disk and the logged steps of this process, and die at one."""
    count = 0

    def counted(real: Callable) -> Callable:
        def call(*args, **named):
            nonlocal count
            count += 1
            if death is None or count != death.number:
                return real(*args, **named)
            if death.torn and real.__name__ == "fsync":
                _tear(args[0])
            if death.after:
                real(*args, **named)
            return os.kill(os.getpid(), signal.SIGKILL)

        return call

    changes = (os, ("fsync", "replace", "unlink", "mkdir", "rmdir")), (fcntl, ("flock",))
    for owner, names in (*changes, (Metrics, ("log",))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    return lambda: count


def _tear(handle: int) -> None:
    """Cut a draft in half. What has its name is whole on disk: a kill takes none of it."""
    path = os.readlink(f"/proc/self/fd/{handle}")
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and ".part" in path:
        os.truncate(path, status.st_size // 2)


def content(path: Path) -> object:
    """What two runs of one kind have in common in a file."""
    if path.name == checkpoint.FILE:  # its metadata, in any order, may name the folder
        tensors, _ = read_tensors(path)
        values = {name: value.flatten().view(torch.uint8) for name, value in tensors.items()}
        return {name: value.numpy().tobytes() for name, value in values.items()}
    if path.name == "report.json":
        report = json.loads(path.read_text())
        return {name: value for name, value in report.items() if name not in CLOCKED}
    return path.read_bytes()
