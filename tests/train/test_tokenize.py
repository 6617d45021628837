"""Images and videos to codes and back, from the command line."""

import json
import os
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import emu3.tools.tokenize
from emu3.cli import app
from emu3.data.codes import load_codes
from emu3.data.media import open_video, read_image, write_image, write_video
from emu3.tools.bulk import find
from emu3.vision import VisionTokenizer, postprocess, preprocess
from emu3.vision.images import to_levels
from emu3.weights import load_vision, save_vision
from tests import children
from tests.model.tiny import TINY_VISION
from tests.train.clips import BIKES, clip
from tests.train.preparing import save_tokenizer

SMALL = ["--min-pixels", "256", "--max-pixels", "4096"]
PLACES = {"tokenize": ("in", "codes", SMALL), "detokenize": ("codes", "back", [])}
BOUNDS = {"min_pixels": 256, "max_pixels": 4096}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Emu3's architecture, small and untrained; its codes are latents, so that many are used."""
    return save_tokenizer(tmp_path_factory.mktemp("weights") / "vision.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images and a video of 10 frames, so that its last four are not full."""
    torch.manual_seed(1)
    write_image(tmp_path / "in/b.png", torch.randint(256, (3, 30, 41), dtype=torch.uint8))
    write_image(tmp_path / "in/a/b.png", torch.randint(256, (3, 16, 16), dtype=torch.uint8))
    write_video(tmp_path / "in/a/c.mp4", clip(10, 32, 48), Fraction(30000, 1001))
    return tmp_path


def words(command: str, folder: Path, weights: Path, *more) -> list[str]:
    source, out, small = PLACES[command]
    paths = [folder / source, "--out", folder / out, "--vision", weights]
    return [command, *map(str, [*paths, *small, *more])]


def emu3_(*given) -> object:
    return CliRunner().invoke(app, words(*given))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {n: ((folder / n).read_bytes(), (folder / n).stat().st_mtime_ns) for n in files(folder)}


ALL = ["a/b.png.safetensors", "a/c.mp4.safetensors", "b.png.safetensors"]


def test_the_folder_is_mirrored_and_images_have_the_codes_of_the_tokenizer(folder, weights):
    done = emu3_("tokenize", folder, weights)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "3 files written, 0 skipped" in done.stdout
    assert files(folder / "codes") == ALL
    codes, header = load_codes(folder / "codes/b.png.safetensors")
    pixels = preprocess(Image.open(folder / "in/b.png"), **BOUNDS)
    assert codes.equal(load_vision(weights).encode(pixels[None])[0])
    assert codes.unique().numel() > 10
    assert (header.source, header.height, header.width) == ("b.png", 30, 41)
    assert header.resized == (32, 40) == tuple(pixels.shape[1:])
    assert header.frames is header.fps is None


@pytest.mark.parametrize("clips", ["pieces", "stream"])
def test_a_video_is_encoded_by_fours_or_in_turn(clips, folder, weights):
    assert emu3_("tokenize", folder, weights, "--clips", clips).exit_code == 0
    codes, header = load_codes(folder / "codes/a/c.mp4.safetensors")
    assert (header.frames, header.fps, header.resized) == (10, "30000/1001", (32, 48))
    frames = [preprocess(f.permute(1, 2, 0), **BOUNDS) for f in open_video(folder / "in/a/c.mp4")]
    whole = torch.stack([*frames, frames[-1], frames[-1]])
    tokenizer = load_vision(weights)
    stream = tokenizer.encode(whole[None])[0]
    pieces = tokenizer.encode(whole.unflatten(0, (3, 4)))[:, 0]
    assert not pieces.equal(stream)
    assert codes.equal({"pieces": pieces, "stream": stream}[clips])


def test_fps_thins_out_videos_alone(folder, weights):
    assert emu3_("tokenize", folder, weights, "--fps", "10").exit_code == 0
    codes, header = load_codes(folder / "codes/a/c.mp4.safetensors")
    assert (header.frames, header.fps, len(codes)) == (4, "10", 1)


@pytest.mark.parametrize("clips", ["pieces", "stream"])
def test_codes_come_back_as_png_and_mp4(clips, folder, weights):
    assert emu3_("tokenize", folder, weights, "--clips", clips).exit_code == 0
    done = emu3_("detokenize", folder, weights)
    assert (done.exit_code, done.stderr) == (0, "")
    assert files(folder / "back") == ["a/b.png.png", "a/c.mp4.mp4", "b.png.png"]
    tokenizer = load_vision(weights)
    codes, _ = load_codes(folder / "codes/b.png.safetensors")
    (image,) = postprocess(tokenizer.decode(codes[None]))
    assert (np.array(image) == np.array(Image.open(folder / "back/b.png.png"))).all()
    codes, _ = load_codes(folder / "codes/a/c.mp4.safetensors")
    video = open_video(folder / "back/a/c.mp4.mp4")
    assert (video.height, video.width, video.fps) == (32, 48, Fraction(30000, 1001))
    stream = tokenizer.decode(codes[None])[0]
    pieces = tokenizer.decode(codes[:, None]).flatten(0, 1)
    exact = to_levels(torch.cat((pieces[:10], stream[:10])))
    shown = torch.stack(list(video))
    # H.264 loses much of untrained noise; still every frame is nearest to its own
    nearest = torch.cdist(shown.flatten(1).float(), exact.flatten(1).float()).argmin(1)
    others = {"pieces": range(10), "stream": [0, 1, 2, 3, *range(14, 20)]}  # the first 4 agree
    assert nearest.tolist() == list(others[clips])


def test_the_original_size_comes_back_on_request(folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    assert emu3_("detokenize", folder, weights).exit_code == 0
    assert read_image(folder / "back/b.png.png").shape == (3, 32, 40)
    done = emu3_("detokenize", folder, weights, "--original-size", "--overwrite")
    assert done.exit_code == 0
    assert read_image(folder / "back/b.png.png").shape == (3, 30, 41)


def test_what_is_there_is_left_out_and_made_again_on_request(folder, weights):
    for command, out in (("tokenize", "codes"), ("detokenize", "back")):
        assert emu3_(command, folder, weights).exit_code == 0
        before = state(folder / out)
        done = emu3_(command, folder, weights)
        assert "0 files written, 3 skipped" in done.stdout
        assert state(folder / out) == before
        done = emu3_(command, folder, weights, "--overwrite")
        assert "3 files written, 0 skipped" in done.stdout
        again = state(folder / out)
        assert all(again[name][1] > before[name][1] for name in before)


def test_codes_newer_than_their_image_are_decoded_again(folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    assert emu3_("detokenize", folder, weights).exit_code == 0
    later = time.time() + 9
    os.utime(folder / "codes/b.png.safetensors", (later, later))
    assert "1 files written, 2 skipped" in emu3_("detokenize", folder, weights).stdout


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--clips", "stream"], "a/c.mp4.safetensors was made with other settings"),
        (["--max-pixels", "1024"], "a/b.png.safetensors was made with other settings"),
        (["--vision", "OTHER"], "a/b.png.safetensors is of another tokenizer"),
    ],
)
def test_codes_of_another_making_stop_the_run_before_it_begins(change, line, folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    (folder / "codes/b.png.safetensors").unlink()
    before = state(folder / "codes")
    save_vision(folder / "other.safetensors", VisionTokenizer(TINY_VISION))
    change = [str(folder / "other.safetensors") if word == "OTHER" else word for word in change]
    done = emu3_("tokenize", folder, weights, *change)
    assert done.exit_code == 1
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert state(folder / "codes") == before


def test_comparing_writes_both_side_by_side_with_psnr_and_ssim(folder, weights):
    done = emu3_("tokenize", folder, weights, "--compare", folder / "side")
    assert (done.exit_code, done.stderr) == (0, "")
    assert files(folder / "side") == [
        *("a/b.png.json", "a/b.png.png", "a/c.mp4.json", "a/c.mp4.mp4", "b.png.json", "b.png.png")
    ]
    both = np.array(Image.open(folder / "side/b.png.png")).astype(np.float64)
    original = postprocess(preprocess(Image.open(folder / "in/b.png"), **BOUNDS)[None])[0]
    assert (both[:, :40] == np.array(original)).all()
    codes, _ = load_codes(folder / "codes/b.png.safetensors")
    assert (
        both[:, 40:] == np.array(postprocess(load_vision(weights).decode(codes[None]))[0])
    ).all()
    told = json.loads((folder / "side/b.png.json").read_text())
    error = np.square(both[:, :40] - both[:, 40:]).mean()
    assert told["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert -1 < told["ssim"] < 1
    assert (told["source"], told["frames"]) == ("b.png", 1)
    assert json.loads((folder / "side/a/c.mp4.json").read_text())["frames"] == 10
    video = open_video(folder / "side/a/c.mp4.mp4")
    assert (video.height, video.width, len(list(video))) == (32, 96, 10)


def test_a_comparison_asked_for_later_is_made(folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    done = emu3_("tokenize", folder, weights, "--compare", folder / "side")
    assert "3 files written" in done.stdout
    done = emu3_("tokenize", folder, weights, "--compare", folder / "side")
    assert "0 files written, 3 skipped" in done.stdout
    done = emu3_("tokenize", folder, weights, "--compare", folder / "in/side")
    assert "must not be in a folder that is tokenized" in done.stderr


def spoil(folder: Path) -> None:
    """Four bad files among the good ones."""
    (folder / "in/cut.mp4").write_bytes(BIKES.read_bytes()[:300_000])
    (folder / "in/empty.jpg").touch()
    Image.fromarray(np.zeros((16, 16), np.float32)).save(folder / "in/float.tif")
    write_image(folder / "in/strip.png", torch.zeros(3, 8, 48, dtype=torch.uint8))


SPOILT = [
    ("cut.mp4", "is not a video, or is truncated"),
    ("empty.jpg", "is not an image, or has no pixels or unknown channels"),
    ("float.tif", "has pixels of mode F; expected RGB"),
    ("strip.png", "smart_resize: a side may be 5 times the other at most, got 8 x 48"),
]


def test_bad_files_are_named_one_line_each_and_all_others_are_done(folder, weights):
    spoil(folder)
    done = emu3_("tokenize", folder, weights)
    assert done.exit_code == 1
    assert "3 files written, 0 skipped" in done.stdout
    assert files(folder / "codes") == ALL
    lines = done.stderr.splitlines()
    assert len(lines) == len(SPOILT)
    for line, (name, reason) in zip(lines, SPOILT, strict=True):
        assert line.startswith("emu3: ")
        assert str(folder / "in" / name) in line
        assert reason in line


def test_a_video_that_breaks_off_in_the_middle_leaves_nothing(folder, weights):
    whole = bytearray(BIKES.read_bytes())
    whole[100_000:160_000] = bytes(60_000)
    (folder / "in/d.mp4").write_bytes(whole)
    done = emu3_("tokenize", folder, weights, "--compare", folder / "side")
    assert done.exit_code == 1
    assert "d.mp4" in done.stderr
    assert files(folder / "codes") == ALL
    assert not any(name.startswith("d.mp4") for name in files(folder / "side"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.safetensors", b"", "is not a safetensors file"),
        ("x.safetensors", b"words", "is not a safetensors file"),
        ("b.png.safetensors", "half", "is not a safetensors file"),
        ("x.safetensors", "weights", "is not a file of codes"),
    ],
)
def test_corrupt_codes_are_named_and_all_others_are_done(name, content, line, folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    path = folder / "codes" / name
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(weights.read_bytes() if content == "weights" else content)
    good = len(files(folder / "codes")) - 1
    done = emu3_("detokenize", folder, weights)
    assert done.exit_code == 1
    assert f"{good} files written" in done.stdout
    assert line in done.stderr
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(files(folder / "back")) == good


def test_codes_of_another_tokenizer_are_not_decoded(folder, weights):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    save_vision(folder / "other.safetensors", VisionTokenizer(TINY_VISION))
    done = emu3_("detokenize", folder, folder / "other.safetensors")
    assert done.exit_code == 1
    assert done.stderr.count("is of another tokenizer") == 3
    assert not (folder / "back").exists()


@pytest.mark.parametrize("content", [b"", b"words", "half"])
def test_corrupt_weights_give_one_line_and_no_file(content, folder, weights):
    broken = folder / "broken.safetensors"
    whole = weights.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    done = emu3_("tokenize", folder, broken)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"emu3: weights: {broken} is not a safetensors file")
    assert done.stderr.count("\n") == 1
    assert not (folder / "codes").exists()


def test_a_run_stopped_in_the_middle_goes_on_to_the_same_codes(folder, weights, monkeypatch):
    assert emu3_("tokenize", folder, weights).exit_code == 0
    exact = {name: content for name, (content, _) in state(folder / "codes").items()}
    (folder / "codes").rename(folder / "exact")
    calls = iter(range(99))

    def save(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        save_codes(*args)

    save_codes = emu3.tools.tokenize.save_codes
    monkeypatch.setattr(emu3.tools.tokenize, "save_codes", save)
    assert emu3_("tokenize", folder, weights).exit_code != 0
    assert files(folder / "codes") == ALL[:1]
    done = emu3_("tokenize", folder, weights)
    assert "2 files written, 1 skipped" in done.stdout
    assert {name: content for name, (content, _) in state(folder / "codes").items()} == exact


def test_a_run_killed_at_any_time_leaves_whole_files_alone(folder, weights):
    """Killed where it stands, as soon as the first codes are there: no handler runs."""
    for number in range(30):
        write_image(folder / f"in/{number:03}.png", torch.full((3, 32, 32), number % 256).byte())
    process, _ = children.start(invoke, words("tokenize", folder, weights))
    while not list((folder / "codes").glob("0*.safetensors")):
        assert process.is_alive(), process.exitcode
        time.sleep(0.01)
    process.kill()
    process.join()
    there = [item.source for item in find([folder / "codes"], [".safetensors"]).items]
    assert 0 < len(there) < 33
    for path in there:
        load_codes(path)
    done = emu3_("tokenize", folder, weights)
    assert f"{33 - len(there)} files written, {len(there)} skipped" in done.stdout
    assert len(list((folder / "codes").rglob("*.safetensors"))) == 33
    assert not list((folder / "codes").glob(".*"))


@pytest.mark.e2e
def test_a_rank_that_met_a_bad_file_does_not_stop_the_others(folder, weights):
    """torchrun ends all ranks when one has failed; rank 0 has the bad file and is done at once."""
    for path in list((folder / "in").rglob("*.*")):
        path.unlink()
    (folder / "in/0.png").touch()
    write_video(folder / "in/1.mp4", clip(600, 16, 24), Fraction(25))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "emu3", *words("tokenize", folder, weights)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "0.png is not an image" in done.stderr
    assert files(folder / "codes") == ["1.mp4.safetensors"]
    assert len(load_codes(folder / "codes/1.mp4.safetensors")[0]) == 150


def invoke(words: list[str], largest_file: int | None = None) -> tuple[int, str]:
    """Exit code and stderr of a command, in this process; the kernel refuses larger files."""
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("size", "more"),
    [(100, []), pytest.param(8000, ["--compare", "side"], marks=pytest.mark.e2e)],
)
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_no_half_file(size, more, folder, weights):
    """The kernel refuses the bytes of a file past ``size``."""
    more = [str(folder / "side") if word == "side" else word for word in more]
    code, stderr = children.run(invoke, words("tokenize", folder, weights, *more), size)
    assert code == 1
    assert stderr.startswith("emu3: [Errno 27] File too large")
    assert stderr.count("\n") == 1
    for out in ("codes", "side"):
        assert not list((folder / out).rglob(".*"))
    assert files(folder / "codes") == ([] if size == 100 else ALL[:1])
