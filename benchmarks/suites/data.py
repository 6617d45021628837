"""The path of the data: how full rows become, and how fast a store is opened and read.

Fill is COUNTED over windows of the named mixes; times and memory are MEASURED on stores that are
written for it, with pages in the cache of the system.
"""

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table
from safetensors.numpy import save

from benchmarks.harness import machine, run
from emu3.config import EMU3_VOCABULARY
from emu3.data.codes import Making
from emu3.data.packing import pack
from emu3.data.store import (
    BIN,
    IDX,
    META,
    Document,
    Kind,
    Provenance,
    Store,
    index_bytes,
    write_shard,
)
from emu3.data.stream import Rows, SourceSettings, StoreStream, StreamSettings

IDS = EMU3_VOCABULARY
WINDOWS = 16
WAYS = (4096, 0), (4096, 128), (16384, 128)
"""Documents of a window, and tokens of a piece of a text at least; 0 leaves texts whole."""
SHARDS = 64
Lengths = Callable[[np.random.Generator, int], np.ndarray]
Mix = tuple[tuple[float, str], ...]
"""Shares of the tokens, and what has them."""

LENGTHS: dict[str, Lengths] = {
    "text": lambda random, n: np.clip(np.exp(random.normal(np.log(400), 1.2, n)), 8, None),
    "512²": lambda random, n: 4163 + random.integers(40, 90, n),
    "720²": lambda random, n: 8193 + random.integers(40, 90, n),
    "clip of 8": lambda random, n: 8 * 4161 + random.integers(40, 90, n),
    "clip of 30": lambda random, n: 30 * 4161 + random.integers(40, 90, n),
}
"""Tokens of documents: texts are log-normal, an image or clip of codes has a caption."""
MIXES: list[tuple[int, Mix]] = [
    (5120, ((0.5, "text"), (0.5, "512²"))),
    (5120, ((0.2, "text"), (0.8, "512²"))),
    (5120, ((0.1, "text"), (0.9, "512²"))),
    (5120, ((1.0, "512²"),)),
    (9216, ((0.5, "text"), (0.5, "512²"))),
    (131072, ((0.3, "text"), (0.3, "512²"), (0.4, "720²"))),
    (131072, ((0.2, "text"), (0.3, "720²"), (0.5, "clip of 8"))),
    (131072, ((1.0, "720²"),)),
    (131072, ((1.0, "clip of 30"),)),
]


def data(
    documents: Annotated[int, typer.Option(help="Of the store that is indexed.", min=1)] = 10**7,
    tokens: Annotated[int, typer.Option(help="To read, about.", min=1)] = 5 * 10**7,
    windows: Annotated[int, typer.Option(help="Of 4,096 documents, to pack.", min=1)] = WINDOWS,
) -> None:
    """Count how full rows become, and time opening and reading of token stores."""
    torch.set_num_threads(1)
    run.console.print(fill_table(windows))
    with tempfile.TemporaryDirectory() as folder:
        run.console.print(opening(Path(folder) / "index", documents), soft_wrap=True)
        run.console.print(reading(Path(folder) / "tokens", tokens), soft_wrap=True)
    run.console.print(f"{machine.processor()}, load {machine.load():.1f}")


def sampled(mix: Mix, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of ``count`` documents, and whether each is a text."""
    names = [name for _, name in mix]
    means = [LENGTHS[name](random, 100_000).mean() for name in names]
    odds = np.array([share / mean for (share, _), mean in zip(mix, means, strict=True)])
    kinds = random.choice(len(mix), count, p=odds / odds.sum())
    lengths = np.empty(count, np.int64)
    for kind, name in enumerate(names):
        lengths[kinds == kind] = LENGTHS[name](random, int((kinds == kind).sum()))
    return lengths, np.array([name == "text" for name in names])[kinds]


def fill(
    room: int, mix: Mix, windows: int, ways: Sequence[tuple[int, int]] = WAYS
) -> dict[tuple[int, int], "Filled"]:
    """How full rows become by the documents of a window and the smallest piece of a text.

    The longer the windows, the fewer there are.
    """
    found = {}
    for window, smallest in ways:
        random, filled = np.random.default_rng(0), Filled()
        for _ in range(max(1, windows * 4096 // window)):
            filled.add(room, *sampled(mix, random, window), smallest)
        found[window, smallest] = filled
    return found


@dataclass
class Filled:
    """Sums over windows."""

    documents: int = 0
    tokens: int = 0
    room: int = 0
    cuts: int = 0
    seconds: float = 0.0

    def add(self, room: int, lengths: np.ndarray, is_text: np.ndarray, smallest: int) -> None:
        started = time.perf_counter()
        rows = pack(lengths, is_text, room, smallest)
        self.seconds += time.perf_counter() - started
        self.documents += len(lengths)
        self.room += room * len(rows)
        self.tokens += sum(piece.length for row in rows for piece in row)
        self.cuts += sum(piece.start > 0 for row in rows for piece in row)

    @property
    def share(self) -> float:
        return self.tokens / self.room


def fill_table(windows: int) -> Table:
    table = Table(title="COUNTED: fill of rows and cuts a document; MEASURED: rate")
    ways = [f"{window:,}, {'cut' if cut else 'whole'}" for window, cut in WAYS]
    for column in ("context", "shares of tokens", *ways, "cuts", "documents/s"):
        table.add_column(column, justify="left" if column.startswith("shares") else "right")
    for room, mix in MIXES:
        ways = fill(room, mix, windows)
        cut = ways[4096, 128]
        name = ", ".join(f"{what} {share:g}" for share, what in mix)
        shown = *(f"{way.share:.4f}" for way in ways.values()), f"{cut.cuts / cut.documents:.1%}"
        rate = f"{cut.documents / cut.seconds:,.0f}"
        table.add_row(f"{room:,}", name, *shown, rate)
    return table


def opening(folder: Path, documents: int) -> str:
    """Open a store whose ids are a hole in the disk, and pack one window of it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, count in enumerate(np.diff(np.linspace(0, documents, SHARDS + 1).astype(int))):
        if count:
            _hollow(folder / f"shard-{number:05}", random.integers(200, 5000, count))
    before, started = _memory(), time.perf_counter()
    store = Store(folder)
    opened = time.perf_counter() - started
    settings = StreamSettings(sources=(SourceSettings(store=folder),), context=5120)
    rows = Rows(settings, IDS, seed=0)
    rows.window(1)
    ready = time.perf_counter() - started
    more = [f"{now - before[what]} MiB {what}" for what, now in _memory().items()]
    return (
        f"MEASURED: {len(store):,} documents ({store.tokens:,} tokens, {len(store.shards)} shards) "
        f"opened in {opened:.3f} s, the first window packed after {ready:.2f} s, "
        f"{' and '.join(more)}"
    )


def reading(folder: Path, tokens: int) -> str:
    """Take batches from a store of texts and images, in this process."""
    random = np.random.default_rng(0)
    mix = MIXES[0][1]
    lengths, is_text = sampled(mix, random, max(64, round(tokens / 1100)))
    documents = (
        _document(int(n), Kind.TEXT if text else Kind.PAIR, random)
        for n, text in zip(lengths, is_text, strict=True)
    )
    write_shard(folder / "shard", documents, _made())
    settings = StreamSettings(
        sources=(SourceSettings(store=folder),), context=5120, batch_size=8, describe=0.5
    )
    stream = StoreStream(settings, IDS, seed=0)
    stream.next_batch()
    started, read = time.perf_counter(), 0
    while read < tokens:
        read += stream.next_batch()[0].numel()
    seconds = time.perf_counter() - started
    return (
        f"MEASURED: {read / seconds:,.0f} tokens/s to batches of 8 rows of 5,121 tokens, packing "
        f"among it, one process, one thread"
    )


def _document(length: int, kind: Kind, random: np.random.Generator) -> Document:
    if kind == Kind.TEXT:
        words = random.integers(0, IDS.num_text, max(1, length - 2))
        return Document(np.concatenate(([IDS.bos], words, [IDS.eos])), kind)
    caption = length - 4163
    words = random.integers(0, IDS.num_text, caption)
    codes = random.integers(IDS.visual_start, IDS.size, (64, 65))
    codes[:, -1] = IDS.eol
    image = [IDS.boi, IDS.img_token], codes.ravel(), [IDS.eof, IDS.eoi]
    return Document(np.concatenate(([IDS.bos], words, *image, [IDS.eos])), kind, caption=caption)


def _hollow(prefix: Path, lengths: np.ndarray) -> None:
    """A shard as ``write_shard`` writes it, whose ``.bin`` takes no place."""
    real = write_shard(prefix, [Document([IDS.bos], Kind.TEXT)], _made())
    header = real.model_copy(
        update={"documents": len(lengths), "tokens": int(lengths.sum()), "idx_sha256": ""}
    )
    arrays = {
        "kinds": np.zeros(len(lengths), np.int8),
        "captions": np.zeros(len(lengths), np.int32),
        "answers": np.zeros((0, 2), np.int32),
        "answer_ends": np.zeros(len(lengths) + 1, np.int64),
    }
    with prefix.with_name(prefix.name + BIN).open("wb") as file:
        file.truncate(4 * header.tokens)
    raw = save(arrays, {"emu3_store": header.model_dump_json()})
    prefix.with_name(prefix.name + META).write_bytes(raw)
    prefix.with_name(prefix.name + IDX).write_bytes(index_bytes(lengths))


def _made() -> Provenance:
    return Provenance(
        source="made", digest="", vocabulary=IDS, text="", vision=None, making=Making()
    )


def _memory() -> dict[str, int]:
    """MiB of this process: its own, and of the files that it has mapped and read."""
    status = Path("/proc/self/status").read_text()
    kinds = {"more of memory": "RssAnon", "of mapped files": "RssFile"}
    return {
        what: int(re.search(rf"{name}:\s*(\d+)", status)[1]) >> 10 for what, name in kinds.items()
    }
