"""The command line: what it writes, and one line for every mistake."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.config import load_recipe
from emu3.model import Emu3
from emu3.weights import save_decoder
from tests.train.recipes import decoder_words, vision_words


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
    out = tmp_path / "pictures.png"
    done = emu3("generate", "a red seven", "an orange one", *files, "--out", out)
    assert done.exit_code == 0, done.output
    with Image.open(out) as image:
        assert image.size == (32, 16)
    done = emu3("chat", out, *files)
    assert done.exit_code == 0, done.output
    assert "pictures.png: " in done.output.replace("\n", "")


def test_the_same_seed_draws_the_same_picture(tmp_path, files):
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
        (["train", "digitz"], "emu3: recipe: no file 'digitz'; those that ship are digits"),
        (["train", "digits"], "emu3: train: data.tokenizer must name a trained vision tokenizer"),
        (["train", "digits", "data.tokenizer=none.safetensors"], "emu3: weights: no file none"),
        (["generate", "x", "--decoder", "none"], "emu3: weights: no file none"),
        (["generate", "x", "FILES", "--top-k", "0"], "emu3: keep_top: top_k must be at least 1"),
        (["chat", "none.png", "FILES"], "emu3: [Errno 2] No such file or directory: "),
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


def test_chat_refuses_what_is_no_picture(tmp_path, files):
    (tmp_path / "notes.png").write_text("words")
    done = emu3("chat", tmp_path / "notes.png", *files)
    assert done.exit_code == 1
    assert "cannot identify image file" in done.stderr
