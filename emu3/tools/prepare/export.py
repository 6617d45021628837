"""Token stores as WebDataset tars: ``KEY.npy`` with the ids and ``KEY.json`` with the rest."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from emu3.data.store import Kind, Shard, Store
from emu3.files import replacing


def export_tars(store: Store, out: Path) -> list[Path]:
    """Write a tar for every shard, whose bytes depend on the shard alone; one that is there stays.

    ``emu3 prepare`` makes the documents of the store from them again.
    """
    paths = []
    for shard in store.shards:
        path = out / f"{shard.prefix.name}.tar"
        if not path.exists():
            with replacing(path) as draft, tarfile.open(draft, "w") as tar:
                for document in range(len(shard)):
                    _add(tar, shard, document)
        paths.append(path)
    return paths


def _add(tar: tarfile.TarFile, shard: Shard, document: int) -> None:
    array = io.BytesIO()
    np.save(array, shard.ids(document), allow_pickle=False)
    stated = {
        "kind": Kind(shard.kinds[document]).name.lower(),
        "caption": int(shard.captions[document]),
        "answers": shard.answers(document).tolist(),
        "text": shard.header.made.text,
        "vision": shard.header.made.vision,
    }
    for ending, content in (("npy", array.getvalue()), ("json", json.dumps(stated).encode())):
        member = tarfile.TarInfo(f"{document:09}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
