"""One training to a folder, at a time."""

import os
import signal

import pytest

from emu3.demo.redraw import run_redraw
from emu3.demo.run import run_demo
from emu3.tasks import TASKS, train
from emu3.train import loop
from emu3.train.lock import locked
from tests import children
from tests.train.recipes import DECODER_WORDS, VISION_WORDS, tiny_recipe, tokenizer_words

REFUSED = r"^train: another process is training in .*{}$"


def refusal(folder) -> str:
    """The error of a second process."""
    try:
        train(tiny_recipe("vision", folder), folder / "run")
    except ValueError as error:
        return str(error)
    return "trained"


def die_with_the_lock(folder) -> None:
    with locked(folder):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.e2e
def test_a_second_training_in_a_folder_is_refused_and_the_first_is_left_alone(tmp_path):
    """It replaced the first one's curve under its open handle, and their checkpoints mixed."""
    run = tmp_path / "run"
    with locked(run):
        (run / "metrics.jsonl").write_text("the first one's\n")
        assert children.run(refusal, tmp_path) == f"train: another process is training in {run}"
        assert (run / "metrics.jsonl").read_text() == "the first one's\n"
        assert {path.name for path in run.iterdir()} == {".lock", "metrics.jsonl"}


def test_a_second_one_that_resumes_is_refused_too(tmp_path):
    recipe, run = tiny_recipe("vision", tmp_path), tmp_path / "run"
    train(recipe, run)
    with locked(run), pytest.raises(ValueError, match=REFUSED.format("run")):
        train(recipe, run, resume=True)


@pytest.mark.e2e
def test_a_killed_run_s_lock_does_not_block(tmp_path):
    assert children.exit_code(die_with_the_lock, tmp_path / "run") == -signal.SIGKILL
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").is_file()


def test_a_run_that_ended_while_the_next_one_was_built_is_not_overwritten(tmp_path):
    """Both had found the folder empty; the second waited for nothing and began anew."""
    recipe, run = tiny_recipe("vision", tmp_path), tmp_path / "run"

    def build(recipe):
        train(recipe, run)
        return TASKS["vision"].build(recipe)

    with pytest.raises(ValueError, match="already holds a run"):
        loop.train(recipe, run, build)


def test_a_second_demo_in_a_folder_is_refused(tmp_path):
    """It deleted the runs of the first."""
    kept = tmp_path / "runs" / "vision" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("the first one's\n")
    with locked(tmp_path), pytest.raises(ValueError, match=REFUSED.format(tmp_path.name)):
        run_demo(tmp_path, VISION_WORDS, DECODER_WORDS)
    assert kept.read_text() == "the first one's\n"


def test_a_demo_deletes_no_run_of_a_training_that_lives(tmp_path):
    run = tmp_path / "runs" / "decoder"
    with locked(run), pytest.raises(ValueError, match=REFUSED.format("decoder")):
        run_demo(tmp_path, VISION_WORDS, DECODER_WORDS)
    assert run.is_dir()


def test_a_second_redraw_in_a_folder_is_refused(tmp_path):
    words = tokenizer_words(tmp_path)
    with locked(tmp_path), pytest.raises(ValueError, match=REFUSED.format(tmp_path.name)):
        run_redraw(tmp_path, words=words)
