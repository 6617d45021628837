"""``emu3 generate``: files that tell what they are and can be repeated, clips, and bad options."""

import re
from fractions import Fraction

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.media import open_video, read_about, read_image, write_image, write_video
from emu3.generate import generate_images
from emu3.tools.origin import read_origin
from tests.train.tiny_files import tiny_files

SETTINGS = ["--guidance", 2.5, "--top-k", 40, "--top-p", 0.9, "--temperature", 0.8]
SETTINGS += ["--negative", "dull", "--positive", ", bright", "--seed", 2**64 - 2, "--ratio", "2:1"]


def emu3(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def succeed(*words):
    done = emu3(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_files(tmp_path_factory.mktemp("model"))


def test_every_image_is_a_file_that_tells_its_prompt_and_seed_and_comes_alone_too(tmp_path, files):
    out = tmp_path / "many"
    done = succeed("generate", "a seven", "größe 😀", *files, *SETTINGS, "--count", 2, "--out", out)
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == ["0001.png", "0002.png", "0003.png", "0004.png"]
    assert done.stdout == "".join(f"wrote {path}\n" for path in paths)
    origins = [read_origin(path) for path in paths]
    assert [one["prompt"] for one in origins] == ["a seven", "a seven", "größe 😀", "größe 😀"]
    assert [one["seed"] for one in origins] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert read_about(paths[3])["Description"] == "größe 😀"
    assert len({path.read_bytes() for path in paths}) == 4
    for path in (paths[1], paths[2]):
        again = tmp_path / "again.png"
        succeed("generate", "--from", path, "--out", again)
        assert again.read_bytes() == path.read_bytes()


def test_an_option_overrides_what_a_repeated_image_tells(tmp_path, files):
    first, other = tmp_path / "first.png", tmp_path / "other.png"
    succeed("generate", "a seven", *files, *SETTINGS, "--out", first)
    succeed("generate", "--from", first, "--guidance", 1, "--ratio", "1:1", "--out", other)
    told, again = read_origin(first), read_origin(other)
    changed = {name for name in told if told[name] != again[name]}
    assert changed == {"guidance", "ratio", "grid"}
    assert again["grid"] == [4, 4]


def test_windows_and_narrow_weights_are_told_and_repeated(tmp_path, files):
    """A window draws the same image; weights in 8 bits draw another, which repeats itself."""
    plain, wide, narrow, again = (tmp_path / f"{i}.png" for i in range(4))
    succeed("generate", "a seven", *files, *SETTINGS, "--out", plain)
    done = succeed("generate", "--from", plain, "--window", 8, "--preview", "--out", wide)
    assert re.search(r"1\.png, \d\.\d\d codes a forward\n$", done.output)
    assert read_image(wide).equal(read_image(plain))
    assert read_origin(wide)["window"] == 8
    succeed("generate", "--from", plain, "--weights", "int8", "--out", narrow)
    succeed("generate", "--from", narrow, "--out", again)
    assert again.read_bytes() == narrow.read_bytes()
    assert read_origin(again)["weights"] == "int8"
    done = emu3("generate", "--from", wide, "--window", 4, "--fork", 4, "--out", again)
    assert done.stderr.startswith("emu3: generate: a window of 4 tokens must have a fork of 1 to 3")
    done = emu3("generate", "--from", plain, "--window", 65, "--out", again)
    assert done.stderr == "emu3: generate: a window must be 1 or 2 to 64 tokens, got 65\n"


def test_a_clip_is_repeated_continued_and_begun_with_an_image(tmp_path, files):
    clip, again, longer, moving = (tmp_path / f"{i}.mp4" for i in range(4))
    video = ["--video", "--fps", 8, "--seconds", 1]
    succeed("generate", "it moves", *files, *video, "--seed", 3, "--out", clip)
    assert frames_of(clip) == (8, Fraction(8))
    succeed("generate", "--from", clip, "--out", again)
    assert again.read_bytes() == clip.read_bytes()
    succeed("generate", *files, "--continue", clip, "--frames", 4, "--out", longer)
    assert frames_of(longer) == (12, Fraction(8))
    succeed("generate", "--from", longer, "--out", again)
    assert again.read_bytes() == longer.read_bytes()
    write_image(tmp_path / "start.png", torch.full((3, 8, 8), 200, dtype=torch.uint8))
    image = ["--image", tmp_path / "start.png"]
    succeed("generate", *files, *image, "--frames", 8, "--preview", "--out", moving)
    assert frames_of(moving) == (8, Fraction(8))
    write_image(tmp_path / "start.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    done = emu3("generate", "--from", moving, "--out", again)
    assert (
        done.stderr == f"emu3: generate: {tmp_path}/start.png must be as it was, it has changed\n"
    )


def frames_of(path):
    video = open_video(path)
    return sum(1 for _ in video), video.fps


def test_the_first_frames_of_a_continued_clip_are_left_out_if_they_fill_no_frame_of_codes(
    tmp_path, files
):
    """Frozen frames between the given and the new ones would stop all motion."""
    frames = [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in range(0, 240, 40)]
    write_video(tmp_path / "six.mp4", frames, Fraction(8))
    out = tmp_path / "longer.mp4"
    succeed("generate", *files, "--continue", tmp_path / "six.mp4", "--frames", 4, "--out", out)
    assert frames_of(out) == (8, Fraction(8))


def test_previews_grow_row_by_row_in_the_file_itself(tmp_path, files, monkeypatch):
    out, seen = tmp_path / "x.png", []

    def watched(path, image, about):
        write_image(path, image, about)
        grey = (read_image(path) == 128).all(0).all(1)
        seen.append(int(grey.sum()))

    monkeypatch.setattr("emu3.tools.draw.write_image", watched)
    succeed("generate", "x", *files, "--preview", "--out", out)
    assert seen == [6, 4, 2, 0]
    grown = out.read_bytes()
    succeed("generate", "x", *files, "--out", out)
    assert out.read_bytes() == grown


def test_prompts_come_line_by_line_from_a_file(tmp_path, files):
    (tmp_path / "p.txt").write_bytes("\ufeffein großer\r\n\r\nzwei\n".encode())
    succeed("generate", "--prompts", tmp_path / "p.txt", *files, "--out", tmp_path / "out")
    told = [read_origin(path)["prompt"] for path in sorted((tmp_path / "out").iterdir())]
    assert told == ["ein großer", "zwei"]


def test_a_terminal_is_shown_the_speed_and_the_time_left(tmp_path, files, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = succeed("generate", "x", *files, "--out", tmp_path / "x.png")
    assert "100 %" in done.stderr
    assert "tokens/s" in done.stderr
    assert "0:00:00" in done.stderr


def test_what_was_written_before_a_failure_stays_whole(tmp_path, files, monkeypatch):
    calls = []

    def fails_later(*args, **rest):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return generate_images(*args, **rest)

    monkeypatch.setattr("emu3.tools.draw.generate_images", fails_later)
    out = tmp_path / "out"
    done = emu3("generate", "x", "y", *files, "--batch", 1, "--preview", "--out", out)
    assert done.exit_code == 1
    assert [path.name for path in out.iterdir()] == ["0001.png"]
    with Image.open(out / "0001.png") as image:
        image.load()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x", "--ratio", "6:1"], "ratio must be 5 at most, got 6:1"),
        (
            ["seven " * 90],
            "generate: a caption may have 488 tokens beside its image or clip, got 540",
        ),
        (["  "], "generate: a prompt must have words, got ' '"),
        ([], "generate: a prompt must be given"),
        (["x", "--count", 0], "--count: must be at least 1, got 0"),
        (["x", "--batch", 0], "--batch: must be at least 1, got 0"),
        (["x", "--out", "a.mp4"], "--out: must be a file that ends in .png, got 'a.mp4'"),
        (["x", "y", "--out", "a.png"], "--out: must be a folder for 2 files, got a.png"),
        (
            ["x", "--out", "notes.txt/a.png"],
            "--out: notes.txt must be a folder that can be written",
        ),
        (
            ["x", "--video", "--out", "a.png"],
            "--out: must be a file that ends in .mp4, got 'a.png'",
        ),
        (["--image", "notes.txt"], "notes.txt: an image or a video must end in one of .avi"),
        (["--image", "none.png"], "image: none.png cannot be read: No such file or directory"),
        (["--image", "broken.png"], "image: broken.png is not an image"),
        (["--continue", "broken.png"], "generate: broken.png must be a video for --continue"),
        (["x", "--fps", 8], "fps is for --video, --image and --continue"),
        (["x", "--video", "--fps", "fast"], "fps: must be frames per second, such as 12, 29.97"),
        (["x", "--video", "--frames", 6], "generate: frames must be a multiple of 4, got 6"),
        (["x", "--video", "--frames", 4, "--seconds", 1], "frames or seconds must be given, got"),
        (["--from", "broken.png"], "image: broken.png cannot be read: cannot identify"),
        (["--from", "plain.png"], "--from: plain.png has no settings of emu3 generate"),
        (["--from", "odd.png"], "--from: odd.png has no settings of emu3 generate: size: "),
        (["--prompts", "broken.png"], "--prompts: broken.png must be UTF-8 text: "),
        (["--prompts", "empty.txt"], "--prompts: empty.txt has no prompt"),
        (["x", "--prompts", "empty.txt"], "--prompts: must be without prompts beside it"),
    ],
)
def test_a_mistake_gives_one_line_and_no_file(words, line, tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.png").write_bytes(b"\xff\xfe words")
    grey = torch.zeros(3, 8, 8, dtype=torch.uint8)
    write_image(tmp_path / "plain.png", grey)
    write_image(tmp_path / "odd.png", grey, {"emu3": '{"prompt": "x", "size": 3}'})
    before = set(tmp_path.rglob("*"))
    done = emu3("generate", *words, *files)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"emu3: {line}")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert set(tmp_path.rglob("*")) == before


def test_an_unknown_option_is_told_in_one_line():
    done = emu3("generate", "x", "--gidance", 3)
    assert done.exit_code == 2
    assert done.stderr.startswith("emu3 generate: No such option: --gidance")
    assert done.stderr.count("\n") == 1
