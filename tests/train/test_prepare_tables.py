"""Parquet files, saved datasets and Emu3's own lists, to token stores: ``emu3 prepare``."""

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3.data.compose import chat_document, parts_document
from emu3.data.store import Store
from emu3.templates import Turn
from tests.train.preparing import codes_of, parts_of, png, prepare, save_tokenizer
from tests.train.stores import TEXT

needs_arrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("weights") / "vision.safetensors")


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
