"""Several processes that write into one folder, and what those that were killed leave there."""

import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.codes import load_codes
from emu3.data.media import write_image
from emu3.files import replacing
from emu3.tools.bulk import find
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_vision
from tests import children
from tests.model.tiny import TINY_VISION


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_file_have_drafts_of_their_own(tmp_path):
    """Both wrote one draft: the first to finish moved it away under the other."""
    path = tmp_path / "x.json"
    with replacing(path) as slow:
        slow.write_text("slow")
        with replacing(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert entries(tmp_path) == ["x.json"]


def write(path: str, *, killed: bool = False) -> None:
    with replacing(Path(path)) as draft:
        draft.write_text("half")
        # What safetensors leaves beside its target, if it is killed.
        (draft.parent / ".tmpYT63fl").write_text("half")
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)


def be_killed(path: str) -> None:
    write(path, killed=True)


def test_the_next_process_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    """A checkpoint is gigabytes: each kill would leave as many."""
    assert children.exit_code(be_killed, str(tmp_path / "x.safetensors")) == -signal.SIGKILL
    (left,) = entries(tmp_path)
    assert left.startswith(".")
    other_machine = tmp_path / f".00000000-{left.split('-', 1)[1]}"
    other_machine.mkdir()
    with replacing(tmp_path / "y.safetensors") as mine:
        mine.touch()
        assert children.exit_code(write, str(tmp_path / "z.safetensors")) == 0
        assert entries(tmp_path) == sorted([other_machine.name, mine.parent.name, "z.safetensors"])
    assert entries(tmp_path) == [other_machine.name, "y.safetensors", "z.safetensors"]


def test_a_draft_is_no_input_and_no_weights(tmp_path):
    torch.manual_seed(0)
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(TINY_VISION))
    with replacing(tmp_path / "other.safetensors") as draft:
        draft.write_text("half")
        assert [item.name.name for item in find([tmp_path], [".safetensors"]).items] == [
            "vision.safetensors"
        ]
        load_vision(tmp_path)


def invoke(words: list[str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_a_folder_make_whole_files_and_leave_nothing(processes, tmp_path):
    """Of two processes on one folder, one ended with "No such file or directory"."""
    torch.manual_seed(0)
    weights = tmp_path / "vision.safetensors"
    save_vision(weights, VisionTokenizer(TINY_VISION))
    names = [f"{number:02}.png" for number in range(24)]
    for number, name in enumerate(names):
        write_image(tmp_path / "in" / name, torch.full((3, 16, 16), 10 * number).byte())
    paths = [tmp_path / "in", "--out", tmp_path / "codes", "--vision", weights]
    words = ["tokenize", *map(str, paths), "--min-pixels", "64"]
    running = [children.start(invoke, words) for _ in range(processes)]
    assert [pipe.recv() for _, pipe in running] == [(0, "")] * processes
    assert entries(tmp_path / "codes") == [f"{name}.safetensors" for name in names]
    for path in (tmp_path / "codes").iterdir():
        load_codes(path)
