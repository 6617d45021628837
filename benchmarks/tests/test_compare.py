"""``compare``: two trees side by side, and nothing of the other one left behind."""

import json
import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import compare, machine


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of one commit."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "file").touch()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "build", lambda tree: None)
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))
    return root


def worktrees(root: Path) -> int:
    listed = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def failing_build(tree: Path) -> None:
    raise RuntimeError("no compiler")


@pytest.fixture
def interruptible():
    """A process of pytest-xdist ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("happens", "seen"),
    [
        (lambda: None, None),
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), KeyboardInterrupt),
    ],
)
def test_the_other_tree_is_removed_whatever_happens(repository, happens, seen):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = pytest.raises(seen) if seen else nullcontext()
    with stopped, compare.other_tree(compare.resolve("HEAD")) as tree:
        assert (tree / "file").exists()
        happens()
    assert not tree.parent.exists()
    assert worktrees(repository) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_commit_that_does_not_build_is_removed(repository, monkeypatch):
    monkeypatch.setattr(compare, "build", failing_build)
    with pytest.raises(RuntimeError, match="no compiler"):
        compare.other_tree(compare.resolve("HEAD")).__enter__()
    assert worktrees(repository) == 1
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]


def test_every_row_is_saved_with_its_inputs_once(tmp_path):
    stated = json.loads(compare.save_calls(tmp_path, ["swiglu"], 1, None).read_text())
    ways = {(row["op"], row["direction"], *row["leaves"]) for row in stated["rows"].values()}
    assert ways == {("swiglu", way, "gate", "up") for way in ("forward", "backward")}
    saved = {row["inputs"] for row in stated["rows"].values()}
    assert len(saved) < len(stated["rows"])
    assert all(Path(path).exists() for path in saved)


OLD_LIBRARY = """
import torch

def swiglu(gate, up, *, backend=None):
    if backend == "gone":
        raise NotImplementedError("swiglu: no such backend")
    return torch.nn.functional.silu(gate) * up
"""


@pytest.mark.e2e
@pytest.mark.parametrize("backend", [None, "gone"])
def test_the_public_functions_of_any_tree_are_timed(tmp_path, monkeypatch, backend):
    """The other tree has one function and none of our modules."""
    (tmp_path / "old/emu3_kernels").mkdir(parents=True)
    (tmp_path / "old/emu3_kernels/__init__.py").write_text(OLD_LIBRARY)
    monkeypatch.setattr(compare.entries, "work_of", lambda op, device: WORK)
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    calls = compare.save_calls(tmp_path, ["swiglu", "rms_norm"], 1, backend)
    timed = compare.time_side(tmp_path / "old", calls)
    swiglu, rms_norm = sorted(timed, reverse=True)
    assert "AttributeError" in timed[rms_norm]
    if backend is None:
        assert timed[swiglu] > 0
    else:
        assert timed[swiglu] == "NotImplementedError: swiglu: no such backend"


WORK = [({"num_rows": 3, "width": 8}, "backward", compare.torch.float32)]


def test_ratios_pair_the_processes_of_a_round_and_say_who_lacks_a_row():
    new = {"a": [1.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]}
    old = {"a": [3.0, 4.0, 4.0], "b": ["AttributeError: none"] * 3}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(compare.table("HEAD", new, old))
    assert "2.00x (1.00-3.00)" in captured.get()
    assert "the base cannot run it: AttributeError: none" in captured.get()


def test_an_unknown_commit_is_named(repository, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    refused = CliRunner().invoke(front.app, ["compare", "no-such-commit"])
    assert refused.exit_code == 2
    assert "no-such-commit" in refused.output
