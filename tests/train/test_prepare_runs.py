"""Runs of ``emu3 prepare`` that continue, end early or are refused; stores there and back."""

import re
import resource
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.store import IDX, Store
from emu3.tools.prepare.inputs import units_of
from tests import children
from tests.train.preparing import contents, jsonl, parts_of, prepare, run
from tests.train.stores import chat_document_of, mixed_documents, write_store


def test_a_run_continues_grows_and_tells_changed_inputs(tmp_path):
    first = jsonl(tmp_path / "first.jsonl", [{"text": f"text {n}"} for n in range(25)])
    out = tmp_path / "store"
    assert prepare([first], out, None, "--documents", 10).exit_code == 0
    whole = contents(out)
    assert len(whole) == 9
    for name in whole:
        if name.startswith("first-00001"):
            (out / name).unlink()
    done = prepare([first], out, None, "--documents", 10)
    assert "1 shards written, 2 skipped" in done.stdout
    assert contents(out) == whole
    second = jsonl(tmp_path / "second.jsonl", [{"text": "more"}])
    assert prepare([second], out, None).exit_code == 0
    assert len(Store(out)) == 26
    jsonl(first, [{"text": f"text {n}"} for n in range(5, 30)])
    for more, line in (
        ([], "first-00000.idx was made of other contents"),
        (["--fps", "12"], "was made of other making settings"),
    ):
        done = prepare([first], out, None, "--documents", 10, *more)
        assert done.exit_code == 1
        assert line in done.stderr
        assert done.stderr.count("\n") == 1
    assert prepare([first], out, None, "--documents", 10, "--overwrite").exit_code == 0
    assert parts_of(Store(out))[0] == ["text 5"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "no file or folder"),
        (lambda path: path.write_text("x"), "must be a folder, .jsonl, .json, .tar or .parquet"),
        (lambda path: path.mkdir(), "no file in .* ends in one of"),
    ],
)
def test_an_input_that_is_none_is_told_in_one_line(make, line, tmp_path):
    make(tmp_path / "given")
    done = prepare([tmp_path / "given"], tmp_path / "store", None)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert re.search(line, done.stderr)


def test_two_inputs_of_one_name_are_refused(tmp_path):
    for name in "ab":
        jsonl(tmp_path / name / "t.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="would both become t-00000"):
        units_of([tmp_path / "a/t.jsonl", tmp_path / "b/t.jsonl"], 10)


def test_tars_of_a_store_become_the_store_again(tmp_path):
    """Byte for byte, but for the sidecar's name of the input."""
    chat = chat_document_of(40, [(5, 9), (30, 40)])
    store = write_store(tmp_path / "store", [*mixed_documents(9), chat], shards=2)
    done = run(
        "store", tmp_path / "store", "--verify", "--tars", tmp_path / "tars", "--context", 256
    )
    assert done.exit_code == 0, done.stderr
    assert "2 shards are as they were written" in done.stdout
    assert "COUNTED" in done.stdout
    done = prepare([tmp_path / "tars"], tmp_path / "again", None)
    assert (done.exit_code, done.stderr) == (0, "")
    again = Store(tmp_path / "again")
    for one, other in zip(store.shards, again.shards, strict=True):
        assert one.header.bin_sha256 == other.header.bin_sha256
        assert one.header.idx_sha256 == other.header.idx_sha256
        assert (one.kinds == other.kinds).all()
        assert (one.captions == other.captions).all()
        for document in range(len(one)):
            assert (one.answers(document) == other.answers(document)).all()


def invoke(words: list[str], largest_file: int | None = None) -> tuple[int, str]:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stderr


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_whole_shards(tmp_path):
    """The kernel refuses the bytes of a file past 3,000: of the second shard."""
    texts = [{"text": "x" * length} for length in (3, 3, 900, 3)]
    path = jsonl(tmp_path / "t.jsonl", texts)
    words = ["prepare", str(path), "--out", str(tmp_path / "store"), "--preset", "mini"]
    code, stderr = children.run(invoke, [*words, "--documents", "2"], 3000)
    assert code == 1
    assert stderr.startswith("emu3: [Errno 27] File too large")
    assert stderr.count("\n") == 1
    assert len(Store(tmp_path / "store")) == 2
    assert not list((tmp_path / "store").glob(".*"))


def test_a_killed_run_leaves_whole_shards_and_continues(tmp_path):
    texts = [{"text": f"{n} " * 400} for n in range(1000)]
    path = jsonl(tmp_path / "t.jsonl", texts)
    out = tmp_path / "store"
    words = ["prepare", str(path), "--out", str(out), "--preset", "mini", "--documents", "50"]
    process, _ = children.start(invoke, words)
    while not list(out.glob(f"*{IDX}")):
        assert process.is_alive(), process.exitcode
        time.sleep(0.01)
    process.kill()
    process.join()
    broken = Store(out)
    for shard in broken.shards:
        shard.verify()
    assert 0 < len(broken) < 1000
    done = run(*words)
    assert f"{20 - len(broken.shards)} shards written, {len(broken.shards)} skipped" in done.stdout
    assert not list(out.glob(".*"))
    assert run(*[tmp_path / "whole" if word == str(out) else word for word in words]).exit_code == 0
    assert contents(tmp_path / "whole") == contents(out)


@pytest.mark.e2e
def test_under_torchrun_each_process_makes_its_shards(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(50)])
    words = ["prepare", str(path), "--preset", "mini", "--documents", "10", "--out"]
    assert run(*words, tmp_path / "alone").exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "emu3", *words, str(tmp_path / "both")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 shards written" in done.stdout
    assert "2 shards written" in done.stdout
    assert contents(tmp_path / "alone") == contents(tmp_path / "both")
