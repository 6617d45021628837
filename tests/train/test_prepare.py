"""What people have, to token stores: ``emu3 prepare`` and ``emu3 store``."""

import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.codes import load_codes
from emu3.data.compose import chat_document, parts_document
from emu3.data.media import write_image, write_video
from emu3.data.store import IDX, Store
from emu3.prompt import Clip, parse_document
from emu3.templates import Turn, chat_prompt
from emu3.tools.prepare.inputs import units_of
from emu3.tools.prepare.records import Medium, Sample, sample_of
from emu3.vision import VisionTokenizer, preprocess
from emu3.weights import load_vision, save_vision
from tests import children
from tests.model.tiny import TINY_VISION
from tests.train.clips import clip
from tests.train.stores import IDS, TEXT, chat_document_of, mixed_documents, write_store

SMALL = ["--preset", "mini", "--min-pixels", "256", "--max-pixels", "1024"]
BOUNDS = {"min_pixels": 256, "max_pixels": 1024}
SPAN = 4
needs_arrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vision.safetensors"
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION).eval()
    noise = torch.rand(8, 4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = tokenizer.latents(noise).movedim(1, -1).flatten(0, -2)
        tokenizer.quantize.embedding.weight.copy_(latents[: TINY_VISION.num_codes])
    save_vision(path, tokenizer)
    return path


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randint(
        256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def codes_of(seed: int, weights: Path) -> torch.Tensor:
    pixels = preprocess(picture(seed).permute(1, 2, 0), **BOUNDS)
    return load_vision(weights).encode(pixels[None])[0]


def run(*words: object) -> object:
    return CliRunner().invoke(app, [str(word) for word in words])


def prepare(inputs: list[Path], out: Path, weights: Path | None, *more: object) -> object:
    vision = [] if weights is None else ["--vision", weights]
    return run("prepare", *inputs, "--out", out, *vision, *SMALL, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def parts_of(store: Store) -> list[list]:
    """Texts, codes as lists, and clips, of every document."""
    found = []
    for number in range(len(store)):
        shard, at = store.find(number)
        found.append(
            [
                part
                if isinstance(part, str)
                else (part.codes if isinstance(part, Clip) else part).tolist()
                for part in parse_document(shard.ids(at).tolist(), TEXT, SPAN)
            ]
        )
    return found


def test_a_folder_of_images_videos_and_codes_with_captions_beside(tmp_path, weights):
    given = tmp_path / "photos"
    for seed, name in enumerate(("a", "b", "c")):
        write_image(given / f"{name}.png", picture(seed))
    (given / "a.txt").write_text(" a red seven \n")
    (given / "b.png.json").write_text(json.dumps({"caption": "a blue one"}))
    write_video(given / "d.mp4", clip(6, 16, 16), Fraction(12))
    (given / "d.mp4.txt").write_text("it moves")
    done = prepare([given], tmp_path / "store", weights)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 shards written, 0 skipped" in done.stdout
    assert "4 documents (4 pair)" in done.stdout
    store = Store(tmp_path / "store")
    found = parts_of(store)
    a, b, c = (codes_of(seed, weights).tolist() for seed in range(3))
    assert found[:3] == [["a red seven", a], ["a blue one", b], [c]]
    assert found[3][0] == "it moves"
    ids = store.find(3)[0].ids(3).tolist()
    moving = next(p for p in parse_document(ids, TEXT, 4) if isinstance(p, Clip))
    assert moving.codes.shape == (2, 8, 8)  # six frames, the last four filled up
    assert moving.fps == 12


def test_files_of_codes_give_the_store_of_their_images(tmp_path, weights):
    """``emu3 tokenize`` once, and stores from its files without encoding again."""
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / "in" / f"{name}.png", picture(seed))
    (tmp_path / "in/a.txt").write_text("a red seven")
    done = run(
        "tokenize", tmp_path / "in", "--out", tmp_path / "codes", "--vision", weights, *SMALL[2:]
    )
    assert done.exit_code == 0, done.stderr
    (tmp_path / "codes/a.txt").write_text("a red seven")
    for name in ("in", "codes"):
        assert prepare([tmp_path / name], tmp_path / f"{name}-store", weights).exit_code == 0
    one, other = (parts_of(Store(tmp_path / f"{name}-store")) for name in ("in", "codes"))
    assert one == other
    assert load_codes(tmp_path / "codes/a.png.safetensors")[0].tolist() == one[0][1]
    tars = tmp_path / "tars"
    assert run("store", tmp_path / "in-store", "--tars", tars).exit_code == 0
    assert prepare([tars], tmp_path / "again", weights).exit_code == 0
    assert parts_of(Store(tmp_path / "again")) == one
    other_weights = tmp_path / "other.safetensors"
    torch.manual_seed(9)
    save_vision(other_weights, VisionTokenizer(TINY_VISION))
    done = prepare([tmp_path / "codes"], tmp_path / "wrong", other_weights)
    assert done.exit_code == 1
    assert "is of another tokenizer" in done.stderr
    done = prepare([tars], tmp_path / "wrong", other_weights)
    assert done.exit_code == 1
    assert "is of other tokenizers" in done.stderr
    assert "name their vision tokenizer" in prepare([tars], tmp_path / "wrong", None).stderr
    more = jsonl(tmp_path / "more.jsonl", [{"text": "words"}])
    done = prepare([more], tmp_path / "in-store", other_weights)
    assert "was made with other tokenizers: choose another folder" in done.stderr
    assert len(Store(tmp_path / "in-store")) == 2


def jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_lines_of_texts_pairs_interleaved_documents_and_conversations(tmp_path, weights):
    for seed in range(2):
        write_image(tmp_path / f"{seed}.png", picture(seed))
    said = "<image>\nWhat is it?"
    records = [
        {"text": "only words"},
        {"image": "0.png", "caption": "a red seven"},
        {"images": ["0.png", "1.png"], "text": "from <image> to <image>, changed"},
        {
            "image": "1.png",
            "conversations": [
                {"from": "human", "value": said},
                {"from": "gpt", "value": "a cat"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        },
    ]
    lines = jsonl(tmp_path / "all.jsonl", records)
    (tmp_path / "all.json").write_text(json.dumps(records))
    zero, one = (codes_of(seed, weights) for seed in range(2))
    for name, given in (("lines", lines), ("list", tmp_path / "all.json")):
        done = prepare([given], tmp_path / name, weights)
        assert (done.exit_code, done.stderr) == (0, "")
        store = Store(tmp_path / name)
        assert store.kinds() == {"text": 1, "pair": 1, "mixed": 1, "chat": 1}
        assert parts_of(store)[:3] == [
            ["only words"],
            ["a red seven", zero.tolist()],
            ["from", zero.tolist(), "to", one.tolist(), ", changed"],
        ]
        shard, at = store.find(3)
        ids = shard.ids(at).tolist()
        turns = [Turn([one, "What is it?"], "a cat"), Turn(["Sure?"])]
        prompt = chat_prompt(turns, TEXT)
        assert ids == [*prompt, *TEXT.encode(" yes"), IDS.eos]
        answers = [ids[start:stop] for start, stop in shard.answers(at)]
        assert answers == [TEXT.encode(" a cat"), [*TEXT.encode(" yes"), IDS.eos]]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def img2dataset(path: Path, count: int) -> Path:
    """As img2dataset writes it, with one download that failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            key = f"{number:09}"
            stated = {"caption": f"caption {number}", "key": key, "status": "success"}
            if number == 1:
                stated |= {"status": "failed_to_download", "caption": None}
            else:
                add(tar, f"{key}.png", png(number))
                add(tar, f"{key}.txt", f"caption {number}".encode())
            add(tar, f"{key}.json", json.dumps(stated).encode())
    return path


def test_tars_of_img2dataset_and_a_broken_one(tmp_path, weights):
    img2dataset(tmp_path / "web/00000.tar", 3)
    whole = img2dataset(tmp_path / "web/00001.tar", 3).read_bytes()
    with tarfile.open(tmp_path / "web/00001.tar") as tar:
        at = tar.getmembers()[1].offset
    spoiled = whole[:at] + b"x" + whole[at + 1 :]
    # In a header, in the middle of a member, between two, and a header that is none.
    for broken in (whole[: at + 100], whole[: at + 600], whole[:at], spoiled):
        (tmp_path / "web/00001.tar").write_bytes(broken)
        done = prepare([tmp_path / "web"], tmp_path / "store", weights)
        assert done.exit_code == 1
        assert "00001.tar is damaged after" in done.stderr
        assert done.stderr.count("\n") == 1
    assert parts_of(Store(tmp_path / "store")) == [
        [f"caption {n}", codes_of(n, weights).tolist()] for n in (0, 2)
    ]
    # What was whole stays; the rest follows once it is whole.
    img2dataset(tmp_path / "web/00001.tar", 3)
    done = prepare([tmp_path / "web"], tmp_path / "store", weights)
    assert "1 shards written, 1 skipped" in done.stdout
    assert len(Store(tmp_path / "store")) == 4


@needs_arrow
def test_parquet_and_saved_datasets_of_the_known_forms(tmp_path, weights):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    file = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    cell = {"bytes": png(0), "path": None}
    tables = {
        "llava": {
            "id": ["0"],
            "image": arrow.array([cell], file),
            "conversations": [
                [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "a cat"},
                ]
            ],
        },
        "finevision": {
            "images": arrow.array([[cell]], arrow.list_(file)),
            "texts": [[{"user": "What is it?", "assistant": "a cat"}]],
        },
        "pairs": {"jpg": [png(0)], "caption": ["a red seven"], "score": [1.0]},
    }
    code = codes_of(0, weights)
    chat = chat_document([Turn([code, "What is it?"], "a cat")], TEXT)
    pair = parts_document(["a red seven", code], TEXT)
    for name, columns in tables.items():
        table = arrow.table(columns)
        path = tmp_path / "tables" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(table, path)
        saved = tmp_path / f"saved-{name}" / "train"
        saved.mkdir(parents=True)
        (saved / "state.json").write_text("{}")
        arrows = str(saved / "data-00000-of-00001.arrow")
        with arrow.OSFile(arrows, "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        wanted = pair if name == "pairs" else chat
        for given in (path, saved.parent):
            out = tmp_path / f"{given.name}-store"
            done = prepare([given], out, weights)
            assert (done.exit_code, done.stderr) == (0, "")
            store = Store(out)
            assert len(store) == 1
            assert store.shards[0].ids(0).tolist() == list(wanted.ids)
            answers = [tuple(answer) for answer in store.shards[0].answers(0).tolist()]
            assert answers == list(wanted.answers)


@needs_arrow
def test_parquet_is_cut_into_shards_by_groups_of_rows(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({"text": [f"text {n}" for n in range(50)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    assert prepare([tmp_path / "t.parquet"], tmp_path / "s", None, "--documents", 20).exit_code == 0
    store = Store(tmp_path / "s")
    assert [len(shard) for shard in store.shards] == [20, 20, 10]
    assert parts_of(store) == [[f"text {n}"] for n in range(50)]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    done = prepare([tmp_path / "t.parquet"], tmp_path / "s2", None)
    assert "is not a Parquet file" in done.stderr


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("emu3.tools.prepare.columns.find_spec", lambda name: None)
    (tmp_path / "t.parquet").touch()
    done = prepare([tmp_path / "t.parquet"], tmp_path / "s", None)
    assert done.stderr.startswith("emu3: prepare: to read")
    assert "install emu3-kernels[data]" in done.stderr


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL']}",)


def test_emu3s_own_lists_are_read_without_unpickling(tmp_path, monkeypatch):
    folder = tmp_path / "codes"
    folder.mkdir()
    codes = np.arange(12).reshape(3, 4)
    good = {"name": "1", "images": codes, "texts": "a red seven"}
    torch.save(good, folder / "1.pth")
    torch.save(good | {"images": codes.astype(np.int32), "texts": ""}, folder / "2.pth")
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch.save(good | {"name": Evil()}, folder / "3.pth")
    torch.save(good | {"images": codes.astype(object)}, folder / "4.pth")
    torch.save(good | {"images": codes + 600}, folder / "5.pth")
    torch.save(good | {"images": codes / 2}, folder / "6.pth")
    (folder / "7.pth").write_bytes(pickle.dumps(good, protocol=2)[:50])
    names = [f"{n}.pth" for n in range(1, 9)]
    given = tmp_path / "train.json"
    given.write_text(json.dumps({"prefix": str(folder), "path_list": names}))
    done = prepare([given], tmp_path / "store", None)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 6
    for number in range(3, 9):
        assert f"{number}.pth" in done.stderr
    assert not (tmp_path / "evil").exists()
    assert "6 samples left out" in done.stdout
    assert parts_of(Store(tmp_path / "store")) == [
        ["a red seven", codes.tolist()],
        [codes.tolist()],
    ]
    assert Store(tmp_path / "store").shards[0].header.left_out == 6


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"image": 5}, "neither a path nor bytes"),
        ({"text": 5}, "no string"),
        ({"images": ["a", "b"], "text": "two"}, "must have a mark"),
        ({"image": "a", "text": "<image> and <image>"}, "more marks"),
        ({"image": "a", "conversations": [{"from": "gpt", "value": "x"}]}, "must alternate"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "must end in an answer"),
        ({"conversations": [{"who": "human"}]}, "role"),
        (
            {
                "images": ["a", "b"],
                "messages": [
                    {"role": "user", "content": "<image>x"},
                    {"role": "assistant", "content": "y"},
                ],
            },
            "more than marks",
        ),
        ([1], "attribute"),
    ],
)
def test_a_record_of_no_known_form_is_told(record, line, tmp_path):
    sample = sample_of(record, tmp_path, "here:1")
    assert sample.error.startswith("here:1")
    assert line in sample.error


def test_images_without_marks_stand_before_what_is_said():
    turns = [{"user": "What?", "assistant": "a cat"}]
    sample = sample_of({"images": [b"1", b"2"], "texts": turns}, Path(), "x")
    assert sample == Sample("x", turns=[Turn([Medium(b"1"), Medium(b"2"), "What?"], "a cat")])


def test_bad_samples_cost_a_line_each_and_the_rest_is_made(tmp_path, weights):
    write_image(tmp_path / "good.png", picture(0))
    (tmp_path / "bad.png").write_bytes(b"no image")
    records = [
        {"image": "good.png", "text": "a red seven"},
        {"image": "bad.png", "text": "x"},
        {"image": "none.png", "text": "x"},
        {"text": "  "},
        {"text": "words"},
    ]
    path = jsonl(tmp_path / "a.jsonl", records)
    path.write_text(path.read_text() + "{no json\n\n")
    done = prepare([path], tmp_path / "store", weights)
    assert done.exit_code == 1
    assert "4 samples left out" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line, part in zip(lines, ("bad.png", "none.png", ":4", ":6"), strict=True):
        assert line.startswith("emu3: ")
        assert part in line
    assert len(Store(tmp_path / "store")) == 2
    without = prepare([path], tmp_path / "s2", None)
    assert "name their vision tokenizer with --vision" in without.stderr
    assert len(Store(tmp_path / "s2")) == 1


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
