"""What people have, to token stores: ``emu3 prepare`` of folders, lines and tars."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from emu3.data.codes import load_codes
from emu3.data.media import write_image, write_video
from emu3.data.store import Store
from emu3.prompt import Clip, parse_document
from emu3.templates import Turn, chat_prompt
from emu3.tools.prepare.records import Medium, Sample, sample_of
from emu3.vision import VisionTokenizer
from emu3.weights import save_vision
from tests.model.tiny import TINY_VISION
from tests.train.clips import clip
from tests.train.preparing import (
    SMALL,
    codes_of,
    jsonl,
    parts_of,
    picture,
    png,
    prepare,
    run,
    save_tokenizer,
)
from tests.train.stores import IDS, TEXT


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("weights") / "vision.safetensors")


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
