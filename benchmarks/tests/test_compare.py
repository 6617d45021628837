"""``ops --base``: two commits side by side, and nothing of the other one left behind."""

import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import base, machine


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of one commit, with benchmarks, tests and an op of the working tree beside."""
    root = tmp_path / "repository"
    (root / "emu3_kernels/ops/old").mkdir(parents=True)
    (root / "emu3_kernels/ops/old/cases.py").write_text("TIME = []")
    (root / "benchmarks").mkdir()
    (root / "benchmarks/gone.py").touch()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "benchmarks/gone.py").unlink()
    (root / "benchmarks/results").mkdir()
    for name in ("benchmarks/run.py", "benchmarks/results/x.json", "tests/suite.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "emu3_kernels/ops/old/cases.py").write_text("TIME = [1]")
    (root / "emu3_kernels/ops/new").mkdir()
    (root / "emu3_kernels/ops/new/cases.py").touch()
    monkeypatch.setattr(base, "ROOT", root)
    monkeypatch.setattr(base, "build", lambda tree: None)
    monkeypatch.setattr(base.tempfile, "tempdir", str(tmp_path))
    return root


def worktrees(root: Path) -> int:
    listed = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def test_the_other_commit_is_timed_by_the_benchmarks_and_sizes_of_this_tree(repository):
    with base.other_tree(base.resolve("HEAD")) as tree:
        assert worktrees(repository) == 2
        assert (tree / "emu3_kernels/ops/old/cases.py").read_text() == "TIME = [1]"
        assert not (tree / "emu3_kernels/ops/new").exists()
        assert (tree / "benchmarks/run.py").exists()
        assert not (tree / "benchmarks/results").exists()
        assert not (tree / "benchmarks/gone.py").exists()


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
def test_nothing_stays_behind_whatever_happens(repository, happens, seen):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = pytest.raises(seen) if seen else nullcontext()
    with stopped, base.other_tree(base.resolve("HEAD")) as tree:
        happens()
    assert not tree.parent.exists()
    assert worktrees(repository) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_base_that_does_not_build_stays_nowhere(repository, monkeypatch):
    monkeypatch.setattr(base, "build", failing_build)
    with pytest.raises(RuntimeError, match="no compiler"), base.other_tree(base.resolve("HEAD")):
        pass
    assert worktrees(repository) == 1
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]


def test_ratios_pair_the_processes_of_a_round_and_say_who_lacks_a_row(repository, monkeypatch):
    figures = {"repository": iter([1.0, 2.0, 4.0]), "tree": iter([3.0, 4.0, 4.0])}

    def time_side(tree, ops, threads):
        rows = {"old-row": next(figures[tree.name])}
        return rows | ({"new-row": 1.0} if "new" in ops else {})

    shown = []
    monkeypatch.setattr(base, "time_side", time_side)
    monkeypatch.setattr(base.run.console, "print", lambda what, **how: shown.append(what))
    base.compare("HEAD", ["old", "new"], threads=1, rounds=3)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown[-1])
    (old,) = (line for line in captured.get().splitlines() if "old-row" in line)
    assert "2.00x (1.00-3.00)" in old
    (new,) = (line for line in captured.get().splitlines() if "new-row" in line)
    assert "the base cannot run it" in new


def test_an_unknown_base_is_named(repository, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    refused = CliRunner().invoke(front.app, ["ops", "--base", "no-such-commit"])
    assert refused.exit_code == 2
    assert "no-such-commit" in refused.output
