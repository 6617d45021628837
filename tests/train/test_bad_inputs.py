"""Good, bad, good: a file that cannot be encoded or decoded costs itself, on every run."""

import errno
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import emu3.tools.tokenize
from emu3.cli import app
from emu3.data.codes import load_codes, save_codes
from emu3.data.media import write_image, write_video
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision
from tests.model.tiny import TINY_VISION
from tests.train.clips import clip

GOOD = ["a.png", "z.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vision.safetensors"
    torch.manual_seed(0)
    save_vision(path, VisionTokenizer(TINY_VISION))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(1)
    for name in GOOD:
        write_image(tmp_path / "in" / name, torch.randint(256, (3, 16, 16), dtype=torch.uint8))
    return tmp_path


def run(command: str, source: Path, out: Path, weights: Path):
    small = ["--min-pixels", "64", "--max-pixels", "4096"] if command == "tokenize" else []
    words = [command, source, "--out", out, "--vision", weights, *small]
    return CliRunner().invoke(app, [str(word) for word in words])


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def assert_costs_itself(run_once, bad: Path, line: str, made: list[str]):
    for written, skipped in ((2, 0), (0, 2)):
        done, there = run_once()
        assert done.exit_code == 1
        assert done.stderr.startswith("emu3: ")
        assert done.stderr.count("\n") == 1
        assert str(bad) in done.stderr
        assert line in done.stderr
        assert done.stdout.startswith(f"{written} files written, {skipped} skipped, 1 failed")
        assert files(there) == made


# Ways of being bad: each makes a file in the folder, and may stand in for a part that then fails.


def cut_jpeg(path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


def empty(path, monkeypatch):
    path.touch()


def text(path, monkeypatch):
    path.write_text("words")


def strip(path, monkeypatch):
    write_image(path, torch.zeros(3, 8, 48, dtype=torch.uint8))


def fine(path, monkeypatch):
    write_image(path, torch.zeros(3, 16, 16, dtype=torch.uint8))


def damaged_video(path, monkeypatch):
    write_video(path, clip(12, 64, 64), Fraction(25))
    whole = bytearray(path.read_bytes())
    whole[-len(whole) // 2 :] = bytes(len(whole) // 2)
    path.write_bytes(whole)


def dangling_link(path, monkeypatch):
    path.symlink_to(path.parent / "nothing")


def locked_folder(path, monkeypatch):
    """Root may list any folder: a stand-in for the system's refusal."""
    path.mkdir()
    scandir = os.scandir

    def refuse(given):
        if given == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(given)

    monkeypatch.setattr(os, "scandir", refuse)


def reading_raises(error):
    """A library that reads files raises ``error``."""

    def make(path, monkeypatch):
        path.touch()
        for name in ("read_image", "open_video"):
            library = getattr(emu3.tools.tokenize, name)

            def read(given, *more, library=library):
                if given == path:
                    raise error
                return library(given, *more)

            monkeypatch.setattr(emu3.tools.tokenize, name, read)

    return make


def breaks_off_with(error):
    """The first frames of a video are read, then the disk, the network or a library fails."""

    def make(path, monkeypatch):
        write_video(path, clip(12, 64, 64), Fraction(25))

        def frames(video):
            yield torch.zeros(3, 64, 64, dtype=torch.uint8)
            raise error

        monkeypatch.setattr("emu3.data.media.Video.__iter__", frames)

    return make


def encoding_raises(error):
    """A GPU, or PyTorch on the CPU, has no room for images above 16 x 16."""

    def make(path, monkeypatch):
        write_image(path, torch.zeros(3, 32, 32, dtype=torch.uint8))
        encode = VisionTokenizer.encode

        def small(tokenizer, pixels):
            if pixels.shape[-1] > 16:
                raise error
            return encode(tokenizer, pixels)

        monkeypatch.setattr(VisionTokenizer, "encode", small)

    return make


def nan_latents(path, monkeypatch):
    write_image(path, torch.zeros(3, 32, 32, dtype=torch.uint8))
    latents = VisionTokenizer.latents

    def overflow(tokenizer, frames, *memory):
        return latents(tokenizer, frames, *memory) * (torch.nan if frames.shape[-1] > 16 else 1)

    monkeypatch.setattr(VisionTokenizer, "latents", overflow)


TOO_LARGE = "too large for the memory: tokenize it with a lower --max-pixels"
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has …")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")
BAD_IMAGES = {
    "a truncated JPEG": ("m.jpg", cut_jpeg, "cannot be read"),
    "an empty file": ("m.jpg", empty, "is not an image"),
    "text": ("m.png", text, "is not an image"),
    "too wide": ("m.png", strip, "a side may be 5 times the other"),
    "a damaged video": ("m.mp4", damaged_video, "video: "),
    "a link to nothing": ("m.png", dangling_link, "No such file"),
    "a name too long for its codes": (f"{'m' * 246}.png", fine, "File name too long"),
    "a folder without permission": ("m", locked_folder, "cannot be read"),
    "no permission": (
        "m.jpg",
        reading_raises(PermissionError(errno.EACCES, "Permission denied")),
        "Permission denied",
    ),
    "EXIF of wrong types": (
        "m.jpg",
        reading_raises(TypeError("bad operand type for abs(): 'str'")),
        "TypeError: bad operand type",
    ),
    "a demuxer's own fault": (
        "m.ts",
        reading_raises(IndexError("list index out of range")),
        "IndexError: list index out of range",
    ),
    "no memory to read": ("m.png", reading_raises(MemoryError()), TOO_LARGE),
    "a disk that fails": (
        "m.mp4",
        breaks_off_with(OSError(errno.EIO, "Input/output error")),
        "Input/output error",
    ),
    "a demuxer's fault later on": ("m.ts", breaks_off_with(KeyError("pid")), "KeyError: 'pid'"),
    "latents of NaN": ("m.png", nan_latents, "latents must be finite"),
    "no memory on the GPU": ("m.png", encoding_raises(GPU), TOO_LARGE),
    "no memory for PyTorch": ("m.png", encoding_raises(CPU), TOO_LARGE),
    "no memory for Python": ("m.png", encoding_raises(MemoryError()), TOO_LARGE),
}


@pytest.mark.parametrize(("name", "make", "line"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_input_costs_itself_now_and_on_the_next_run(
    name, make, line, folder, weights, monkeypatch
):
    """All but a ValueError ended the run, and the next run met the same file first."""
    make(folder / "in" / name, monkeypatch)

    def run_once():
        return run("tokenize", folder / "in", folder / "codes", weights), folder / "codes"

    made = [f"{good}.safetensors" for good in GOOD]
    assert_costs_itself(run_once, folder / "in" / name, line, made)


def half_codes(path, monkeypatch):
    path.write_bytes((path.parent / "a.png.safetensors").read_bytes()[:-5])


def too_few_codes(path, monkeypatch):
    codes, header = load_codes(path.parent / "a.png.safetensors")
    more = {"frames": 9, "fps": "25"}
    save_codes(path, codes[None], header.model_copy(update=more))


def other_tokenizer(path, monkeypatch):
    codes, header = load_codes(path.parent / "a.png.safetensors")
    save_codes(path, codes, header.model_copy(update={"tokenizer": "0"}))


def decoding(change):
    """Codes whose pixels are ``change(pixels)``; those of the others stay as they are."""

    def make(path, monkeypatch):
        codes, header = load_codes(path.parent / "a.png.safetensors")
        save_codes(path, codes.repeat(2, 2), header.model_copy(update={"resized": (32, 32)}))
        pixels = VisionTokenizer.pixels

        def changed(tokenizer, quantized, **how):
            made = pixels(tokenizer, quantized, **how)
            return change(made) if made.shape[-1] > 16 else made

        monkeypatch.setattr(VisionTokenizer, "pixels", changed)

    return make


def raise_(error):
    raise error


BAD_CODES = {
    "cut": (half_codes, "is not a safetensors file"),
    "another number of frames": (too_few_codes, "1 frames of codes are not 9 of pixels"),
    "another tokenizer": (other_tokenizer, "is of another tokenizer"),
    "a link to nothing": (dangling_link, "weights: no file"),
    "pixels of NaN": (decoding(lambda pixels: pixels * torch.nan), "pixels must be finite"),
    "no memory on the GPU": (decoding(lambda _: raise_(GPU)), TOO_LARGE),
}


@pytest.mark.parametrize(("make", "line"), BAD_CODES.values(), ids=BAD_CODES)
def test_bad_codes_cost_themselves_now_and_on_the_next_run(
    make, line, folder, weights, monkeypatch
):
    assert run("tokenize", folder / "in", folder / "codes", weights).exit_code == 0
    bad = folder / "codes/m.png.safetensors"
    make(bad, monkeypatch)

    def run_once():
        return run("detokenize", folder / "codes", folder / "back", weights), folder / "back"

    assert_costs_itself(run_once, bad, line, [f"{good}.png" for good in GOOD])


def test_an_output_that_cannot_be_written_ends_the_run(folder, weights, monkeypatch):
    """Its folder is gone, or may not be written: no other file would fare better."""
    (folder / "codes").write_text("a file where the folder of codes should be")
    done = run("tokenize", folder / "in", folder / "codes", weights)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("emu3: [Errno ")
    assert done.stderr.count("\n") == 1


def test_kinds_that_are_passed_over_are_counted_and_named(folder, weights):
    """A folder of GIFs and HEICs beside two PNGs was a success of two files."""
    for name in ("b.gif", "c.gif", "d.HEIC", "README", ".hidden.gif"):
        (folder / "in" / name).touch()
    (folder / "elsewhere").mkdir()
    (folder / "in/link").symlink_to(folder / "elsewhere")
    os.mkfifo(folder / "in/pipe.png")
    done = run("tokenize", folder / "in", folder / "codes", weights)
    assert done.exit_code == 0
    kinds = done.stdout.rstrip("\n").partition("; passed over 2 .gif, ")[2]
    assert sorted(kinds.split(", ")) == [
        *("1 .HEIC", "1 linked folders", "1 special files", "1 without ending")
    ]


def test_the_help_is_printed_where_characters_lack():
    """Its dots are one character, which ASCII lacks."""
    for command in (["--help"], ["train", "--help"]):
        done = CliRunner(charset="ascii").invoke(app, command)
        assert done.exit_code == 0, done.exception


def test_names_that_are_not_utf8_are_made_and_told(folder, weights):
    """Neither JSON nor safetensors nor the console took such a name, and that after the work."""
    odd = os.fsdecode(b"\xff\xe9")
    (folder / "in/a.png").rename(folder / f"in/{odd}.png")
    write_video(folder / f"in/{odd}.mp4", clip(4, 16, 16), Fraction(25))
    (folder / f"in/{odd}.bmp").touch()
    for summary in ("3 files written, 0 skipped, 1 failed", "0 files written, 3 skipped, 1 failed"):
        done = run("tokenize", folder / "in", folder / "codes", weights)
        assert done.exit_code == 1
        assert done.stdout.startswith(summary)
        assert done.stderr.count("\n") == 1
        assert "is not an image" in done.stderr
    _, header = load_codes(folder / r"codes/\xff\xe9.png.safetensors")
    assert header.source == r"\xff\xe9.png"
    assert run("detokenize", folder / "codes", folder / "back", weights).exit_code == 0
    assert files(folder / "back") == [r"\xff\xe9.mp4.mp4", r"\xff\xe9.png.png", "z.png.png"]
