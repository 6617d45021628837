"""``emu3 curate`` as a user runs it: folders and tars, bad files, stops, and changed thresholds."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

import emu3.cli.curate
from emu3.data.media import open_video
from emu3.data.store import Store
from emu3.prompt import Clip, parse_document
from emu3.tools.tokenize import encode_video
from emu3.vision import preprocess
from emu3.weights import load_vision
from tests.curate.endpoint import fake_endpoint
from tests.curate.making import (
    SMALL,
    black,
    curate,
    moving,
    still,
    subtitled,
    without_text,
    write_clip,
    write_photo,
)
from tests.train.preparing import BOUNDS, prepare, save_tokenizer
from tests.train.stores import TEXT


def rows_of(out: Path) -> dict[str, dict]:
    return {row["id"]: row for row in parquet.read_table(out / "manifest.parquet").to_pylist()}


def reasons_of(out: Path) -> dict[str, list[str]]:
    return {name: [r.split()[0] for r in row["reasons"]] for name, row in rows_of(out).items()}


def score_files(out: Path) -> bytes:
    return b"".join(sorted(path.read_bytes() for path in (out / "scores").iterdir()))


def kept_records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Photographs, one of them twice, one small, and a video of six scenes."""
    folder = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_photo(folder / f"photos/{seed}.png", seed)
    (folder / "photos/0.txt").write_text("a red one")
    shutil.copy(folder / "photos/1.png", folder / "photos/again.png")
    write_photo(folder / "photos/small.png", 7, 60, 60)
    scenes = moving(1, 24), still(2, 24), moving(3, 24, 8, (1, 0.8, 0.6)), black(24), moving(4, 30)
    write_clip(folder / "clip.mp4", *scenes)
    return folder


@pytest.fixture(scope="module")
def curated(media, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    done = without_text(media, "--out", out, *SMALL, "--set", "videos.seconds.min=1")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "6 files measured, 0 measured before" in done.stdout
    assert "3 of 5 images kept" in done.stdout
    assert "2 of 6 clips kept" in done.stdout
    return out


def test_each_clip_and_image_is_kept_or_dropped_for_what_it_shows(curated):
    """Of equal images the first is kept; ``again`` follows ``1`` by its name."""
    assert reasons_of(curated) == {
        "clip.mp4#0-24": [],
        "clip.mp4#24-48": ["flow"],
        "clip.mp4#48-72": ["flow"],
        "clip.mp4#72-84": ["luma", "flow"],
        "clip.mp4#84-96": ["luma", "flow"],
        "clip.mp4#96-126": [],
        "photos/0.png": [],
        "photos/1.png": [],
        "photos/2.png": [],
        "photos/again.png": ["shows"],
        "photos/small.png": ["short_edge"],
    }
    row = rows_of(curated)["clip.mp4#0-24"]
    assert (row["width"], row["height"], row["seconds"]) == (256, 144, 2)
    # Two pixels a frame of a twelfth of a second, in eighths of a second.
    assert row["flow"] == pytest.approx(2 * 12 / 8 / 144, rel=0.1)


def test_a_subtitled_clip_is_dropped_and_a_plain_one_kept(tmp_path):
    """The only run here that reads text; a frame of each clip is enough."""
    write_clip(tmp_path / "in/a.mp4", moving(1, 24), subtitled(moving(2, 24)))
    few = ["--set", "measure.text_fps=0.5", "--set", "videos.seconds.min=1"]
    done = curate(tmp_path / "in", "--out", tmp_path / "out", *SMALL, *few)
    assert done.exit_code == 0, done.stderr
    assert reasons_of(tmp_path / "out") == {"a.mp4#0-24": [], "a.mp4#24-48": ["text"]}
    covers = [row["text"] for row in rows_of(tmp_path / "out").values()]
    assert covers[0] == 0
    assert covers[1] > 0.1


def test_a_changed_threshold_measures_nothing_and_needs_no_input(curated, media, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated, out)
    before = score_files(out)
    hidden = tmp_path / "gone"
    shutil.move(media / "clip.mp4", hidden)
    try:
        words = "--out", out, *SMALL, "--set", "videos.flow.min=0", "--set", "duplicates=-1"
        done = without_text(*words, "--set", "videos.luma.min=0", "--set", "videos.seconds.min=1")
    finally:
        shutil.move(hidden, media / "clip.mp4")
    assert (done.exit_code, done.stderr) == (0, "")
    assert reasons_of(out) == reasons_of(curated) | {
        "clip.mp4#24-48": [],
        "clip.mp4#72-84": [],
        "clip.mp4#84-96": [],
        "photos/again.png": [],
    }
    assert score_files(out) == before
    done = without_text("--out", out, "--set", "measure.flow_fps=4")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "settings of measure have changed: name the inputs, too" in done.stderr


def test_what_is_measured_is_measured_again_only_where_it_changed(curated, media, tmp_path):
    out, copied = tmp_path / "out", tmp_path / "media"
    shutil.copytree(curated, out)
    shutil.copytree(media, copied, copy_function=shutil.copy2)
    done = without_text(copied, "--out", out, *SMALL)
    assert "0 files measured, 6 measured before" in done.stdout
    assert all(row["source"].startswith(str(copied)) for row in rows_of(out).values())
    write_photo(copied / "photos/2.png", 9, 90, 90)
    write_photo(copied / "photos/new.png", 10)
    done = without_text(copied, "--out", out, *SMALL)
    assert "2 files measured, 5 measured before" in done.stdout
    assert reasons_of(out)["photos/2.png"] == ["short_edge"]
    assert reasons_of(out)["photos/new.png"] == []


def test_a_run_that_stopped_anywhere_continues_to_the_same_manifest(curated, media, tmp_path):
    """Its scores end at any byte, in the middle of a line too; nothing whole is measured again."""
    words = media, "--out", tmp_path / "out", *SMALL, "--set", "videos.seconds.min=1"
    scores = (curated / "scores/measures-00000.jsonl").read_bytes()
    for end in (1, len(scores) // 2, len(scores) - 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out/scores").mkdir(parents=True)
        (tmp_path / "out/scores/measures-00000.jsonl").write_bytes(scores[:end])
        done = without_text(*words)
        # A line without its end of line is whole all the same.
        whole = scores[: end + 1].count(b"\n")
        assert f"{6 - whole} files measured, {whole} measured before" in done.stdout
        for name in ("manifest.parquet", "kept.jsonl", "report.html"):
            assert (tmp_path / "out" / name).read_bytes() == (curated / name).read_bytes()


@pytest.mark.distributed
def test_under_torchrun_each_process_measures_and_captions_its_share(curated, media, tmp_path):
    def launched(out):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with fake_endpoint() as endpoint:
            words = "curate", media, "--out", out, *SMALL, "--set", "videos.seconds.min=1"
            more = "--set", "measure.text=false", "--captions", endpoint.url
            voter = "--voter", "tests.curate.test_curate:brightness"
            command = [*torchrun, "--nproc-per-node=2", "-m", "emu3", *words, *more, *voter]
            done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return endpoint.requests, done.stdout

    requests, told = launched(tmp_path / "out")
    assert requests == 5
    assert "5 captions" in told
    written = {path.name for path in (tmp_path / "out/scores").iterdir()}
    names = "measures", "brightness", "captions"
    assert written == {f"{name}-0000{rank}.jsonl" for name in names for rank in range(2)}
    rows, alone = rows_of(tmp_path / "out"), rows_of(curated)
    assert rows.keys() == alone.keys()
    for name, row in alone.items():
        new = {k: v for k, v in rows[name].items() if k not in ("brightness", "caption")}
        assert new == {k: v for k, v in row.items() if k != "caption"}
        assert rows[name]["brightness"] is not None
        assert (rows[name]["caption"] is not None) == row["keep"]


def test_a_tar_gives_the_rows_of_its_files_and_their_captions(curated, media, tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("photos", "clip.mp4"):
            tar.add(media / name, name)
    done = without_text(path, "--out", tmp_path / "out", *SMALL, "--set", "videos.seconds.min=1")
    assert (done.exit_code, done.stderr) == (0, "")
    inside, beside = rows_of(tmp_path / "out"), rows_of(curated)
    apart = {"id", "name", "source", "offset", "size", "reasons", "duplicate_of"}
    assert inside.keys() == {f"shard.tar/{name}" for name in beside}
    for name, row in beside.items():
        other = inside[f"shard.tar/{name}"]
        assert {k: v for k, v in other.items() if k not in apart} == {
            k: v for k, v in row.items() if k not in apart
        }
    assert inside["shard.tar/photos/0.png"]["words"] == "a red one"


def test_bad_files_are_named_with_their_reason_and_cost_themselves(media, tmp_path):
    given = tmp_path / "in"
    write_photo(given / "good.png", 1)
    (given / "noise.jpg").write_bytes(bytes(range(256)))
    (given / "half.png").write_bytes((given / "good.png").read_bytes()[:-900])
    (given / "empty.webp").touch()
    (given / "nowhere.png").symlink_to("nothing")
    (given / "half.mp4").write_bytes((media / "clip.mp4").read_bytes()[:-3000])
    (given / "words.mp4").write_text("not a video")
    shutil.copy(given / "good.png", os.fsdecode(bytes(given) + b"/\xff.png"))
    with tarfile.open(given / "a.tar", "w") as tar:
        for name in ("noise.jpg", "good.png", "half.mp4"):
            tar.add(given / name, name)
    (given / "b.tar").write_bytes((given / "a.tar").read_bytes()[:9000])
    out = tmp_path / "out"
    done = without_text(given, "--out", out, *SMALL)
    assert done.exit_code == 1
    errors = {row["id"]: row["error"] for row in rows_of(out).values() if row["error"]}
    for name, reason in {
        "noise.jpg": "is not an image",
        "half.png": "cannot be read",
        "empty.webp": "is not an image",
        "nowhere.png": "No such file",
        "half.mp4": "is truncated",
        "words.mp4": "is not a video",
        "a.tar/noise.jpg": "is not an image",
        "a.tar/half.mp4": "is truncated",
        r"\xff.png": "a path must be UTF-8",
        "b.tar": "is damaged after 1 images and videos",
    }.items():
        assert reason in errors.pop(name)
    assert list(errors) == ["b.tar/noise.jpg"]
    lines = done.stderr.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("emu3: ") and str(given) in line for line in lines)
    assert not re.search("Traceback|/tmp/tmp", done.stderr)
    assert {name for name, row in rows_of(out).items() if row["keep"]} == {"a.tar/good.png"}
    assert "11 unreadable" in done.stdout
    (given / "words.mp4").write_bytes((media / "clip.mp4").read_bytes())
    assert "10 unreadable" in without_text(given, "--out", out, *SMALL).stdout


def test_the_kept_rows_are_an_input_of_prepare(curated, media, tmp_path):
    """Only the frames of the clip, and the caption beside the file."""
    weights = save_tokenizer(tmp_path / "vision.safetensors")
    done = prepare([curated / "kept.jsonl"], tmp_path / "store", weights)
    assert (done.exit_code, done.stderr) == (0, "")
    store = Store(tmp_path / "store")
    assert len(store) == 5
    parts = [parse_document(store.find(n)[0].ids(n).tolist(), TEXT, 4) for n in range(len(store))]
    clips = [next(p for p in of if isinstance(p, Clip)) for of in parts[:2]]
    assert [clip.codes.shape[0] for clip in clips] == [24 // 4, 32 // 4]
    assert parts[2][0] == "a red one"
    tokenizer = load_vision(weights)
    frames = list(open_video(media / "clip.mp4"))[96:126]
    pixels = (preprocess(frame.permute(1, 2, 0), **BOUNDS) for frame in frames)
    assert torch.equal(clips[1].codes, encode_video(tokenizer, pixels, "pieces"))


def test_kept_rows_of_a_tar_are_an_input_of_prepare(media, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(media / "photos/0.png", "0.png")
        tar.add(media / "photos/0.txt", "0.txt")
        tar.add(media / "clip.mp4", "1.mp4")
    out = tmp_path / "out"
    assert without_text(tmp_path / "a.tar", "--out", out, *SMALL).exit_code == 0
    assert {type(r.get("image", r.get("video"))) for r in kept_records(out)} == {dict}
    weights = save_tokenizer(tmp_path / "vision.safetensors")
    done = prepare([out / "kept.jsonl"], tmp_path / "store", weights)
    assert (done.exit_code, done.stderr) == (0, "")
    assert len(Store(tmp_path / "store")) == 3


def test_the_report_is_one_file_with_samples_on_both_sides_of_a_threshold(curated):
    page = (curated / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    flow = page[page.index("<h3>flow") :].split("<h3>")[1]
    assert "at least 0.003, at most 0.05" in flow
    above = flow[flow.index("below 0.05") :]
    figures = re.findall(r'<figure class="(\w+)" title="([^"]*)"><img [^>]*>([\d.e-]+)<br>', above)
    values = [float(value) for *_, value in figures]
    assert values == sorted(values)
    assert min(values) < 0.05 < max(values)
    sides = [side for side, *_ in figures]
    assert sides == [*["dropped"] * 3, "kept", "kept", "dropped"]
    assert re.search(r"flow 0\.\d+ &gt; 0\.05", page)
    assert page.count("<svg") >= 8
    assert "Near-duplicates: 1" in page


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["none"], "no file or folder none"),
        ([], "name the folders or tars to measure"),
        (["{media}", "--set", "images.beauty.min=1"], "images.beauty: unknown score"),
        (["{media}", "--set", "measure.fps=1"], "measure.fps: unknown setting"),
        (["{media}", "--settings", "none.toml"], "curate: no file none.toml"),
        (["{media}", "--voter", "beauty"], "voter: a name must be KIND:WHAT, got 'beauty'"),
        (["{media}", "--voter", "aesthetic:none"], "none"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(words, line, media, tmp_path):
    words = [word.format(media=media / "photos") for word in words]
    done = without_text(*words, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out/manifest.parquet").exists()


def test_without_its_libraries_one_line_says_what_to_install(media, tmp_path, monkeypatch):
    found = emu3.cli.curate.find_spec
    monkeypatch.setattr("emu3.cli.curate.find_spec", lambda n: None if n == "cv2" else found(n))
    done = without_text(media, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr == "emu3: curate: install emu3-kernels[curate], which has cv2\n"


def brightness(images, prompts):
    """A voter of one's own."""
    return images.mean((1, 2, 3)) * 10


def test_a_voter_adds_its_score_to_rows_that_are_measured(curated, tmp_path):
    """Later, without the inputs; its score is then known to ranges, without the voter too."""
    out = tmp_path / "out"
    shutil.copytree(curated, out)
    measures = (out / "scores/measures-00000.jsonl").read_bytes()
    voter = ["--voter", f"{__name__}:brightness"]
    done = without_text("--out", out, *voter, *SMALL, "--set", "videos.brightness.min=1")
    assert (done.exit_code, done.stderr) == (0, "")
    rows = rows_of(out)
    assert "brightness 0 < 1" in rows["clip.mp4#72-84"]["reasons"]
    expected = rows["photos/0.png"]["luma"] / 25.5
    assert rows["photos/0.png"]["brightness"] == pytest.approx(expected, rel=0.2)
    votes = (out / "scores/brightness-00000.jsonl").read_bytes()
    done = without_text("--out", out, *SMALL, "--set", "images.brightness.min=100")
    assert all("brightness" in reasons_of(out)[f"photos/{n}.png"] for n in range(3))
    assert (out / "scores/brightness-00000.jsonl").read_bytes() == votes
    assert (out / "scores/measures-00000.jsonl").read_bytes() == measures
