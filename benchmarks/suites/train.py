"""Optimizer steps of the miniature's recipes on packed rows, beside Hugging Face and padding.

Every entry takes the same documents from the same weights in as many steps: ours and Hugging Face's
Emu3, each on packed rows and on documents padded to the longest of their step. A padded step has as
many documents as another, drawn at random, or in the order of their length. A useful token is one
with a loss. D documents of a step, T tokens of the longest.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness import clock
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.interleave import paired_ratio
from benchmarks.harness.rows import Taken, row_of
from benchmarks.report.tables import as_table
from benchmarks.suites.model import emu3, hugging_face
from emu3.config import load_recipe
from emu3.data.codes import Making
from emu3.data.compose import parts_document
from emu3.data.store import Document, Provenance, write_shard
from emu3.data.stream import SourceSettings, StoreStream
from emu3.demo.config import ClipRecipe, ClipSettings
from emu3.demo.digits import COLORS, DIGITS, caption
from emu3.demo.files import descriptions
from emu3.demo.moving import DIRECTIONS
from emu3.prompt import Clip
from emu3.text import ByteTokenizer, TextTokenizer
from emu3.train.layout import Batch
from emu3.train.optim import build_optimizer, take_step
from emu3.train.store_recipe import StoreRecipe

OURS, PADDED = "emu3, packed", "emu3, padded"
THEIRS, THEIRS_PACKED = "Hugging Face, padded", "Hugging Face, packed"
SORTED = "Hugging Face, by length"
DIRECTION = "training step"
RECIPES = "stage1-mini", "stage2-mini"
UNEQUAL = "stage2-mini, unequal"
"""With clips of 1 to 12 frames of codes, where the miniature's have 3, and paragraphs of 30 to 600
bytes, where it has whole texts: lengths as unequal as those of the media that people have."""
MIXES = *RECIPES, UNEQUAL
FRAMES, PARAGRAPH = (1, 12), (30, 600)
SAME_LOSS = 1e-5
"""Share by which the losses of two entries may differ."""
DOCUMENTS = 2048
"""Of the stores of images and of clips."""
STEPS, WINDOWS = 32, 15
"""Steps of a call, and of how many calls the most usual one is timed: texts are few and long, so
that padded rows of some are 95 % full and of others 35."""

Rows = tuple[Tensor, Tensor, Tensor]
"""Ids, weights and numbers of documents."""
Loss = Callable[[nn.Module, Rows], Tensor]


class Made(NamedTuple):
    """The same documents in the steps of a recipe; padded rows have one document each."""

    packed: list[Rows]
    padded: list[Rows]
    sorted: list[Rows]
    """Padded, in the order of length."""

    @property
    def useful(self) -> int:
        """Tokens with a loss."""
        return sum(int((weights[:, 1:] > 0).sum()) for _, weights, _ in self.packed)

    def filled(self, rows: Sequence[Rows]) -> float:
        """Share of the tokens of ``rows`` that are of documents, and no padding."""
        whole = sum(int(documents.eq(0).sum()) for _, _, documents in self.padded)
        return whole / sum(ids.numel() for ids, _, _ in rows)


def recipe_of(mix: str, words: Sequence[str] = ()) -> StoreRecipe:
    return load_recipe(mix.split(",")[0], words, StoreRecipe)


def steps_of(
    recipe: StoreRecipe, documents: int = DOCUMENTS, steps: int = STEPS, *, unequal: bool = False
) -> Made:
    """Take ``steps`` steps from stores of documents like those of the miniature.

    Of ``WINDOWS`` times as many, those whose padded rows are nearest to the mean size of all.
    """
    text = ByteTokenizer(recipe.model.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for source in recipe.data.sources:
            store = Path(folder, source.store.name)
            documents_of = _documents(store.name, documents, recipe, text, unequal)
            write_shard(store / "shard", documents_of, _provenance(text))
            sources.append(SourceSettings(store=store, weight=source.weight))
        settings = recipe.data.model_copy(update={"sources": tuple(sources)})
        stream = StoreStream(settings, recipe.model.vocabulary, recipe.train.seed)
        pad = text.vocabulary.pad
        windows = [_made([stream.next_batch() for _ in range(steps)], pad) for _ in range(WINDOWS)]
    sizes = [sum(ids.numel() for ids, _, _ in made.padded) for made in windows]
    return windows[np.abs(np.subtract(sizes, np.mean(sizes))).argmin()]


def _made(packed: list[Rows], pad: int) -> Made:
    found = [document for rows in packed for document in _unpacked(rows, pad)]
    by_length = sorted(found, key=lambda document: len(document[0]))
    np.random.default_rng(0).shuffle(found)
    return Made(packed, *(_padded(of, len(packed), pad) for of in (found, by_length)))


def _unpacked(rows: Rows, pad: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and weights of the documents of packed rows, without what pads these."""
    found = []
    for ids, weights, documents in zip(*rows, strict=True):
        sizes = documents.unique_consecutive(return_counts=True)[1].tolist()
        pieces = zip(ids.split(sizes), weights.split(sizes), strict=True)
        found += [(i, w) for i, w in pieces if not i.eq(pad).all()]
    return found


def _padded(found: Sequence[tuple[Tensor, Tensor]], steps: int, pad: int) -> list[Rows]:
    """Split documents into as many steps, ``[D, T]`` each."""
    return [
        _pad([found[number] for number in numbers], pad)
        for numbers in np.array_split(np.arange(len(found)), steps)
    ]


def _pad(found: Sequence[tuple[Tensor, Tensor]], pad: int) -> Rows:
    shape = len(found), max(len(ids) for ids, _ in found)
    ids, weights, numbers = torch.full(shape, pad), torch.zeros(shape), torch.ones(shape).int()
    for number, (i, w) in enumerate(found):
        ids[number, : len(i)], weights[number, : len(i)] = i, w
        numbers[number, : len(i)] = 0
    return ids, weights, numbers


def entries_of(recipe: StoreRecipe, made: Made, device: str = "cpu") -> Entries:
    """Make the steps of every entry once; a peer of another mean loss is not timed."""
    theirs = hugging_face(recipe.model, torch.float32)
    entries, losses = Entries(clock=clock.of(device)), {}
    for name, is_ours, loss, rows in (
        (OURS, True, ours_packed, made.packed),
        (PADDED, True, ours_padded, made.padded),
        (THEIRS, False, theirs_padded, made.padded),
        (SORTED, False, theirs_padded, made.sorted),
        (THEIRS_PACKED, False, theirs_packed, made.packed),
    ):
        model = emu3(recipe.model, theirs) if is_ours else copy.deepcopy(theirs)
        model = model.to(device).train()
        rows = [tuple(part.to(device) for part in step) for step in rows]
        losses[name] = mean_loss(model, loss, rows)
        if abs(losses[name] / losses[OURS] - 1) > SAME_LOSS:
            entries.drop(name, f"its loss is {losses[name]:.5f}, ours {losses[OURS]:.5f}")
            continue
        entries.add(name, training(recipe, model, loss, rows))
    return entries


@torch.no_grad()
def mean_loss(model: nn.Module, loss: Loss, steps: Sequence[Rows]) -> float:
    """The loss of all documents together, which do not depend on their steps."""
    found = [(loss(model, rows).double(), rows[1][:, 1:].double().sum()) for rows in steps]
    return (sum(mean * weight for mean, weight in found) / sum(w for _, w in found)).item()


def ours_packed(model: nn.Module, rows: Rows) -> Tensor:
    return model.loss(*rows)


def ours_padded(model: nn.Module, rows: Rows) -> Tensor:
    """Padding on the right needs no mask: no token before it attends to it."""
    ids, weights, _ = rows
    return model.loss(ids, weights)


def theirs_padded(model: nn.Module, rows: Rows) -> Tensor:
    ids, weights, _ = rows
    return _weighted(model(ids[:, :-1], use_cache=False).logits, ids[:, 1:], weights[:, 1:])


def theirs_packed(model: nn.Module, rows: Rows) -> Tensor:
    """transformers masks other documents where positions start again."""
    batch = Batch.of(*rows)
    found = model(batch.tokens, position_ids=batch.positions, use_cache=False)
    return _weighted(found.logits, batch.targets, batch.weights)


def _weighted(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


def training(recipe: StoreRecipe, model: nn.Module, loss: Loss, steps: Sequence[Rows]) -> Call:
    """Train on ``steps``: forward, backward, clipping and fused AdamW."""
    optimizer = build_optimizer(model, recipe.optim)

    def call() -> None:
        for rows in steps:
            take_step(model, optimizer, loss(model, rows), recipe.optim.lr, recipe.optim)

    return call


def row(
    recipe: StoreRecipe,
    made: Made,
    entries: Entries,
    taken: Taken,
    threads: int,
    loads: list[float],
    device: str = "cpu",
    *,
    unequal: bool = False,
) -> dict:
    """The row of a recipe: useful tokens a second, how full rows are, and the gains apart."""
    data = recipe.data
    size = {"context": data.context, "rows": data.batch_size, "steps": len(made.packed)}
    if unequal:
        size["documents"] = "unequal"
    case = Case("train", OURS, size, torch.float32, DIRECTION, device)
    found = row_of(case, threads, loads, entries, taken, bound=None)
    for name, standing in [(OURS, found), *found["peers"].items()]:
        standing["tokens_per_s"] = made.useful / median(taken[name])
    rows = {"packed": made.packed, "padded": made.padded, "padded by length": made.sorted}
    found["fill"] = {name: made.filled(of) for name, of in rows.items()}
    found["gains"] = {
        name: paired_ratio(taken[slow], taken[fast])
        for name, (slow, fast) in GAINS.items()
        if slow in taken and fast in taken
    }
    return found


GAINS = {
    "packing, ours": (PADDED, OURS),
    "packing, Hugging Face": (THEIRS, THEIRS_PACKED),
    "kernels, packed": (THEIRS_PACKED, OURS),
    "kernels, padded": (THEIRS, PADDED),
    "both": (THEIRS, OURS),
    "both, by length": (SORTED, OURS),
}
"""What is gained, and the entries before and after it."""


def _documents(
    name: str, count: int, recipe: StoreRecipe, text: TextTokenizer, unequal: bool
) -> Iterator[Document]:
    """Documents of the lengths of the miniature's, of random codes; its texts are its own."""
    if name == "texts":
        texts = _paragraphs() if unequal else descriptions()
        yield from (parts_document([words], text) for words in texts)
        return
    random = np.random.default_rng(0)
    grid, clips = recipe.vision.grid, ClipSettings()
    span = load_recipe("clips-vision", kind=ClipRecipe).vision.temporal_factor
    for _ in range(count):
        digit, color = int(random.integers(len(DIGITS))), int(random.integers(len(COLORS)))
        words, shape = caption(digit, color), grid
        if name == "clips":
            first, last = FRAMES if unequal else (clips.frames // span,) * 2
            shape = int(random.integers(first, last + 1)), *grid
            words = f"{words} moves {random.choice(DIRECTIONS)}"
        codes = torch.from_numpy(random.integers(0, recipe.vision.num_codes, shape))
        shown = Clip(codes, clips.rate, span) if name == "clips" else codes
        yield parts_document([words, shown], text)


def _paragraphs() -> Iterator[str]:
    shortest, longest = PARAGRAPH
    for words in descriptions():
        for paragraph in words.split("\n\n"):
            if shortest <= len(paragraph.strip().encode()) <= longest:
                yield paragraph


def _provenance(text: TextTokenizer) -> Provenance:
    return Provenance(
        source="made",
        digest="",
        vocabulary=text.vocabulary,
        text="bytes",
        vision=None,
        making=Making(),
    )


def dry_run() -> Table:
    """Make one step of each entry on few documents and show it as a row; nothing is measured."""
    rows = []
    small = ["data.context=256", "data.batch_size=2", "train.micro_batch_size=1"]
    for mix in MIXES:
        recipe, unequal = recipe_of(mix, small), mix == UNEQUAL
        made = steps_of(recipe, documents=64, steps=1, unequal=unequal)
        entries = entries_of(recipe, made)
        taken = {entry: [seconds] for entry, seconds in entries.seconds.items()}
        threads = torch.get_num_threads()
        rows.append(row(recipe, made, entries, taken, threads, [], unequal=unequal))
    return as_table("train", rows)
