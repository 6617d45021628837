"""Every block of the README runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from emu3.cli import app
from emu3.config import load_model
from emu3.model import Emu3
from emu3.text import QwenTokenizer
from emu3.vision import VisionTokenizer
from emu3.weights import Pretrained, save
from tests import fresh
from tests.model.published import SMALL, SMALL_8B
from tests.serve.tiny_server import serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
PUBLISHED = "Emu3-Gen"
"""A folder that a user has and a test makes."""
ADDRESS = "http://127.0.0.1:8000"
"""Of the server in the examples."""
SERVED = [line for line in LINES if line.startswith(("emu3 serve", "curl"))]
LINES = [line for line in LINES if line not in SERVED]
SETS_UP = ("cd", "pip install")
"""What CI does before this test can run."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [one for one in blocks("python") if ADDRESS not in one])
def test_the_import_example_runs(block):
    done = fresh.run(block)
    assert re.fullmatch(r"loss \d+\.\d\d, \d+ codes\n", done.stdout), done.stderr


def run(command: list[str], folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make")])
def test_the_targets_of_make_exist(line):
    """Rehearsed: they take minutes, and one of them is this very suite."""
    assert run([*line.split(), "--dry-run"])


@pytest.mark.codegen
@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python")])
def test_the_benchmark_runs(line):
    """Of one op, and without a GPU."""
    options = ["--op", "swiglu", *["--dry-run"] * line.endswith("gpu")]
    assert run([sys.executable, *line.split()[1:], *options])


@pytest.mark.e2e
def test_the_emu3_commands_run_one_after_another(tmp_path, monkeypatch):
    """In this process, as one that starts imports torch anew; with two steps of training."""
    monkeypatch.chdir(tmp_path)
    for line in (line for line in LINES if line.startswith("emu3") and PUBLISHED not in line):
        words = shlex.split(line)[1:]
        words += ["train.steps=2"] if words[0] == "train" else []
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert (tmp_path / "generated.png").stat().st_size > 0


@pytest.mark.e2e
def test_the_commands_on_published_weights_run(tmp_path, monkeypatch):
    """On random ones, a hundredth as wide, and an image of 4 by 4 codes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Emu3(load_model("8b", SMALL_8B)).eval()
    save(Path(PUBLISHED), Pretrained(model, VisionTokenizer(SMALL), QwenTokenizer()), "official")
    for line in (line for line in LINES if PUBLISHED in line):
        words = shlex.split(line)[1:]
        words += ["--area", "1024"] if words[0] == "generate" else []
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert (tmp_path / "generated.png").stat().st_size > 0


@pytest.mark.parametrize("example", [one for one in blocks("python") if ADDRESS in one] + SERVED)
def test_the_examples_of_the_server_run(example, tmp_path, monkeypatch):
    """On a server in this process; its command only starts where there is a GPU."""
    if example.startswith("emu3"):
        options = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
        assert all(word in options for word in shlex.split(example) if word.startswith("--"))
        return
    monkeypatch.chdir(tmp_path)
    with serving(name=PUBLISHED) as served:
        example = example.replace(ADDRESS, served.url)
        if example.startswith("curl"):
            assert '"b64_json"' in run(["bash", "-c", example])
        else:
            exec(example, {})
            assert (tmp_path / "seven.png").stat().st_size > 0


def test_no_line_of_the_readme_goes_untested():
    tested = ("make", "python -m benchmarks", "emu3")
    assert [line for line in LINES if line and not line.startswith((*tested, *SETS_UP))] == []


def test_every_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
