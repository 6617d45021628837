"""The command line: what it writes, and one line for every mistake."""

import re

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.media import read_image
from emu3.model import Emu3
from emu3.tasks import load_recipe
from emu3.tools.look import resized
from emu3.vision import VisionTokenizer
from emu3.weights import save_decoder, save_vision
from tests import fresh
from tests.train.recipes import decoder_words, vision_words

NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 PB"


def emu3(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained decoder and vision tokenizer on disk, as command-line options."""
    folder = tmp_path_factory.mktemp("files")
    recipe = load_recipe("digits", decoder_words(folder))
    torch.manual_seed(0)
    save_decoder(folder / "decoder.safetensors", Emu3(recipe.model))
    vision = folder / "tokenizer.safetensors"
    return ["--decoder", folder / "decoder.safetensors", "--vision", vision]


def test_train_leaves_weights_that_generate_and_chat_can_use(tmp_path, files):
    done = emu3("train", "vision", *vision_words(), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    files = [*files[:3], tmp_path / "run" / "vision.safetensors"]
    out = tmp_path / "images.png"
    done = emu3("generate", "a red seven", *files, "--out", out)
    assert done.exit_code == 0, done.output
    with Image.open(out) as image:
        assert image.size == (16, 16)
    done = emu3("chat", out, *files)
    assert done.exit_code == 0, done.output
    assert "images.png: " in done.output.replace("\n", "")
    done = emu3("chat", out, out, "--ask", "which?", "--max-tokens", 3, *files)
    assert done.exit_code == 0, done.output
    assert done.output.endswith("\n")


def test_the_same_seed_draws_the_same_image(tmp_path, files):
    for name, seed in (("one", 4), ("two", 4), ("other", 5)):
        done = emu3("generate", "x", *files, "--out", tmp_path / f"{name}.png", "--seed", seed)
        assert done.exit_code == 0, done.output
    one, two, other = ((tmp_path / f"{n}.png").read_bytes() for n in ("one", "two", "other"))
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "digits", "optim.lrr=1"], "emu3: optim.lrr: unknown setting; optim has betas"),
        (["train", "digitz"], "emu3: recipe: no file 'digitz'; those that ship are clips"),
        (["train", "digits"], "emu3: train: data.tokenizer must name a trained vision tokenizer"),
        (["train", "digits", "data.tokenizer=none.safetensors"], "emu3: weights: no file none"),
        (["generate", "x", "--decoder", "none"], "emu3: weights: no file none"),
        (["generate", "x", "--out", "x.jpg"], "emu3: --out: must be a file that ends in .png"),
        (["generate", "x", "--out", ""], "emu3: --out: must be a file that ends in .png, got '.'"),
        (
            ["generate", "a red seven", "seven " * 50, "FILES"],
            "emu3: generate: a caption may have 232 tokens beside its image or clip, got 300",
        ),
        (["generate", "\udcff", "FILES"], "emu3: ByteTokenizer: text must be Unicode, got '"),
        (
            ["tokenize", "x", "--out", "o", "--fps", "fast"],
            "emu3: fps: must be frames per second, such as 12, 29.97 or 30000/1001, got 'fast'",
        ),
        (["generate", "x", "FILES", "--top-k", "0"], "emu3: sample_guided: top_k must be at least"),
        (["chat", "none.png", "FILES"], "emu3: image: none.png cannot be read: No such file"),
        (
            ["train", "vision", "data.validation=0.9999"],
            "emu3: data.validation: at least one digit must ",
        ),
    ],
)
def test_a_mistake_gives_one_line_an_exit_code_and_no_file(
    words, line, tmp_path, files, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [part for word in words for part in (files if word == "FILES" else [word])]
    done = emu3(*words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_as_the_command_does():
    """The other tests call commands in their own process."""
    done = fresh.run_module("emu3", "train", "digitz")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("emu3: recipe: no file 'digitz'; those that ship are clips")


def test_a_terminal_that_lacks_a_character_does_not_end_the_command(tmp_path, files):
    """``PYTHONIOENCODING=ascii`` ended ``chat`` in a traceback, after the work."""
    image = tmp_path / "größe.png"
    Image.new("RGB", (16, 16)).save(image)
    words = [str(word) for word in ["chat", image, *files]]
    done = CliRunner(charset="ascii").invoke(app, words)
    assert done.exit_code == 0, done.output
    assert r"gr\xf6\xdfe.png: " in done.stdout


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError(), RuntimeError(NO_MEMORY)],
)
def test_a_command_that_needs_more_memory_says_so_in_one_line(error, tmp_path, files, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("emu3.tools.draw.generate_images", fail)
    done = emu3("generate", "x", *files, "--out", tmp_path / "x.png")
    assert done.exit_code == 1
    assert re.match("emu3: .*[Mm]emory", done.stderr)
    assert done.stderr.count("\n") == 1


def test_a_bug_is_a_traceback(tmp_path, files, monkeypatch):
    monkeypatch.setattr("emu3.tools.draw.generate_images", lambda *_, **__: 1 / 0)
    done = emu3("generate", "x", *files, "--out", tmp_path / "x.png")
    assert isinstance(done.exception, ZeroDivisionError)


def test_chat_refuses_what_is_no_image(tmp_path, files):
    (tmp_path / "notes.png").write_text("words")
    done = emu3("chat", tmp_path / "notes.png", *files)
    assert done.exit_code == 1
    assert "notes.png is not an image" in done.stderr


def test_chat_refuses_an_image_that_is_too_large_in_one_line(tmp_path, files, monkeypatch):
    """Pillow's guard against bombs is no OSError, and came out as a traceback."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 20)).save(tmp_path / "huge.png")
    done = emu3("chat", tmp_path / "huge.png", *files)
    assert done.exit_code == 1
    assert done.stderr.startswith("emu3: image: ")
    assert done.stderr.count("\n") == 1


def test_chat_turns_an_image_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 3  # orientation: upside down
    image = Image.linear_gradient("L").convert("RGB")
    image.save(tmp_path / "turned.png", exif=exif)
    image.rotate(180).save(tmp_path / "upright.png")
    names = "turned.png", "upright.png"
    turned, upright = (resized(read_image(tmp_path / name), side=16) for name in names)
    assert turned.equal(upright)
    assert not turned.equal(turned.flip(1))


def test_a_path_is_told_as_it_is(tmp_path, files):
    """Rich took parts of it for markup: ``[/x]`` ended in a traceback, ``[red]`` vanished."""
    for name in ("[/x].png", "[red].png", ":smile:.png"):
        out = tmp_path / "m" / name
        done = emu3("generate", "x", *files, "--out", out)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"wrote {out}\n"
        assert out.is_file()


@pytest.mark.parametrize(
    "words", [["tokenize", "x.png", "--out", "x"], ["detokenize", "x", "--out", "x"], ["profile"]]
)
def test_a_gpu_that_is_not_there_is_refused(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = emu3(*words, "--device", "cuda")
    assert done.exit_code == 1
    assert done.stderr == "emu3: --device cuda: no GPU that PyTorch can use\n"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["generate", "x", "--seed", 2**64], "--seed"),
        (["profile", "--context", "0"], "--context"),
        (["profile", "--prefill", "0"], "--prefill"),
    ],
)
def test_a_number_out_of_range_names_its_option(words, option):
    done = emu3(*words)
    assert done.exit_code == 2
    plain = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)  # CI may force colours
    assert f"Invalid value for '{option}'" in plain


def test_a_tokenizer_of_another_number_of_codes_is_refused(tmp_path, files):
    """Its codes stood for ids that no codebook row, or another, belongs to."""
    words = [*vision_words(), "vision.num_codes=16", "model.vocabulary.num_visual=16"]
    vision = tmp_path / "small.safetensors"
    save_vision(vision, VisionTokenizer(load_recipe("vision", words).vision))
    done = emu3("generate", "x", *files[:3], vision, "--out", tmp_path / "x.png")
    assert done.exit_code == 1
    decoder = files[1]
    must = f"the vision tokenizer must have 512 codes as the vocabulary of {decoder}, got 16"
    assert done.stderr == f"emu3: load: {must}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ratio", "16:3"], "ratio must be 5 at most, got 16:3"),
        (["--ratio", "wide"], "ratio must be \"width:height\" in positive integers, got 'wide'"),
        (["--area", "0"], "area must be 16 pixels at least at 1:1, got 0"),
        (["--device", "cuda"], "--device cuda: no GPU that PyTorch can use"),
    ],
)
def test_an_image_that_cannot_be_is_refused_in_one_line(words, line, files):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = emu3("generate", "x", *files, *words)
    assert (done.exit_code, done.stderr) == (1, f"emu3: {line}\n")


def test_an_image_has_the_ratio_and_the_area_asked_for(tmp_path, files):
    out = tmp_path / "wide.png"
    done = emu3("generate", "x", *files, "--ratio", "2:1", "--area", 16 * 32, "--out", out)
    assert done.exit_code == 0, done.output
    with Image.open(out) as image:
        assert image.size == (32, 16)


def test_a_tokenizer_too_narrow_for_three_colours_trains_all_the_same(tmp_path):
    """Three colours were to go straight through two channels: an IndexError."""
    words = [
        *vision_words(),
        "train.steps=1",
        "vision.base_channels=2",
        "vision.groups=1",
        "vision.attention_stages=[]",
        "vision.multipliers=[1, 2]",
    ]
    done = emu3("train", "vision", *words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
