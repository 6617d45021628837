"""Damage images and videos at random: each is read, or refused in one line.

    python -m tests.e2e.fuzz images --times 10000
    python -m tests.e2e.fuzz videos --times 5000

A case depends on the seed and its number alone. Any exception but a ``MediaError`` of one line, a
crash, a case of more than 20 s, and growing memory are faults. Cases in which a library writes to
stderr are counted: Pillow cannot silence libtiff.
"""

import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.progress import track

from emu3.data.media import MediaError, open_video, read_image
from tests import children
from tests.media import odd_images, odd_videos

_PATIENCE = 20
_MOST_FRAMES = 5000
"""Of a damaged video of ten."""
_MOST_GROWTH = 64 << 20


@dataclass
class Report:
    """Numbers of files read, refused and noisy; faults; and bytes that memory grew by."""

    read: int = 0
    refused: int = 0
    noisy: int = 0
    faults: list[str] = field(default_factory=list)
    growth: int = 0

    def __str__(self) -> str:
        return (
            f"{self.read} read, {self.refused} refused in a line, {len(self.faults)} faults; "
            f"{self.noisy} with output of a library; memory grew by {self.growth / 2**20:.1f} MiB"
        )


def fuzz(kind: str, numbers: range, seed: int = 0) -> Report:
    """Try the cases ``numbers`` of ``kind``, "images" or "videos"."""
    report, sizes = Report(), []
    cases = track(_cases(kind, numbers, seed), kind, total=len(numbers))
    for number, outcome, is_noisy, size in cases:
        sizes.append(size)
        report.noisy += is_noisy
        if outcome == "read":
            report.read += 1
        elif outcome == "refused":
            report.refused += 1
        else:
            report.faults.append(f"{kind} {number} (seed {seed}): {outcome}")
    tenth = len(sizes) // 10
    if tenth:
        report.growth = max(0, sum(sizes[-tenth:]) - sum(sizes[tenth : 2 * tenth])) // tenth
    if report.growth > _MOST_GROWTH:
        report.faults.append(f"{kind}: memory grew by {report.growth >> 20} MiB")
    return report


Case = tuple[int, str, bool, int]
"""Number, outcome, whether a library wrote to stderr, and resident bytes."""


def _cases(kind: str, numbers: range, seed: int) -> Iterator[Case]:
    """A process that dies costs its case."""
    numbers, size = list(numbers), 0
    while numbers:
        with tempfile.TemporaryDirectory() as folder:
            process, pipe = children.start(_tries, kind, numbers, seed, Path(folder))
            with suppress(EOFError):
                while True:
                    case = pipe.recv()
                    numbers.remove(case[0])
                    size = case[-1]
                    yield case
            process.join()
        if process.exitcode > 0:
            raise RuntimeError(f"fuzz: the process that reads ended with {process.exitcode}")
        if numbers:
            killer = signal.Signals(-process.exitcode).name
            outcome = f"takes over {_PATIENCE} s" if killer == "SIGALRM" else f"dies of {killer}"
            yield numbers.pop(0), outcome, False, size


def _tries(kind: str, numbers: list[int], seed: int, folder: Path) -> Iterator[Case]:
    """Runs in a process of its own, which an alarm kills even inside a library."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    wholes = list(corpus(kind, folder).items())
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), 2)
        for number in numbers:
            signal.alarm(_PATIENCE)
            path, random = write_case(wholes, folder, number, seed)
            outcome = _outcome(kind, path, random)
            path.unlink()
            yield number, outcome, errors.tell() > 0, _resident()
            errors.seek(0)


def corpus(kind: str, folder: Path) -> dict[str, bytes]:
    return odd_images.corpus() if kind == "images" else odd_videos.corpus(folder)


def write_case(
    wholes: list[tuple[str, bytes]], folder: Path, number: int, seed: int
) -> tuple[Path, Random]:
    random = Random(f"{seed} {number}")
    name, whole = random.choice(wholes)
    path = folder / f"{number}-{name}"
    path.write_bytes(damaged(whole, random.choice(wholes)[1], random))
    return path, random


def _outcome(kind: str, path: Path, random: Random) -> str:
    try:
        if kind == "images":
            read_image(path)
            return "read"
        video = open_video(path, random.choice((None, Fraction(25))))
        for count, _ in enumerate(video):
            if count > _MOST_FRAMES:
                return f"{path.name}: has over {_MOST_FRAMES} frames"
    except MediaError as error:
        line = str(error)
        return "refused" if len(line.splitlines()) == 1 else f"not one line: {line!r}"
    except Exception:
        return f"{path.name}: {traceback.format_exc(limit=-3)}"
    return "read"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def damaged(whole: bytes, other: bytes, random: Random) -> bytes:
    """``whole`` with one to sixteen damages; a PNG may get its checksums again."""
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        # Cubed: headers are short, and decide most.
        at = int(len(data) * random.random() ** 3)
        random.choice(_DAMAGES)(data, at, other, random)
    if data.startswith(b"\x89PNG") and random.random() < 0.5:
        _sign_again(data)
    return bytes(data)


def _flip(data: bytearray, at: int, other: bytes, random: Random) -> None:
    data[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + 1])


def _overwrite(data: bytearray, at: int, other: bytes, random: Random) -> None:
    size = random.choice((1, 2, 4, 8))
    bits = 8 * size
    value = random.choice((0, 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits) - 1))
    value = random.choice((value, random.randrange(256), random.getrandbits(bits)))
    data[at : at + size] = value.to_bytes(size, random.choice(("big", "little")))


def _truncate(data: bytearray, at: int, other: bytes, random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _delete(data: bytearray, at: int, other: bytes, random: Random) -> None:
    del data[at : at + _length(random)]


def _insert(data: bytearray, at: int, other: bytes, random: Random) -> None:
    data[at:at] = random.randbytes(_length(random))


def _repeat(data: bytearray, at: int, other: bytes, random: Random) -> None:
    data[at:at] = data[at : at + _length(random)]


def _clear(data: bytearray, at: int, other: bytes, random: Random) -> None:
    length = len(data[at : at + _length(random)])
    data[at : at + length] = bytes(length)


def _splice(data: bytearray, at: int, other: bytes, random: Random) -> None:
    length, source = _length(random), random.randrange(len(other))
    data[at : at + length] = other[source : source + length]


_DAMAGES: tuple[Callable[[bytearray, int, bytes, Random], None], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _overwrite),
    *(_truncate, _delete, _insert, _repeat, _clear, _splice),
)


def _length(random: Random) -> int:
    return int(2 ** random.uniform(0, 11))


def _sign_again(data: bytearray) -> None:
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


app = typer.Typer(add_completion=False)
Times = Annotated[int, typer.Option(help="number of damaged files")]
Seed = Annotated[int, typer.Option(help="of the damages")]
Only = Annotated[int | None, typer.Option(help="write this case here, and try no other")]


def _run(kind: str, times: int, seed: int, only: int | None) -> None:
    if only is not None:
        with tempfile.TemporaryDirectory() as name:
            wholes = list(corpus(kind, Path(name)).items())
        typer.echo(write_case(wholes, Path(), only, seed)[0])
    begin = time.monotonic()
    report = fuzz(kind, range(times) if only is None else range(only, only + 1), seed)
    typer.echo("\n".join([*report.faults, f"{report}; {time.monotonic() - begin:.0f} s"]))
    raise typer.Exit(1 if report.faults else 0)


@app.command()
def images(times: Times = 10_000, seed: Seed = 0, only: Only = None) -> None:
    """Damage images of every kind that is read."""
    _run("images", times, seed, only)


@app.command()
def videos(times: Times = 5_000, seed: Seed = 0, only: Only = None) -> None:
    """Damage videos of every container that is read."""
    _run("videos", times, seed, only)


if __name__ == "__main__":
    app()
