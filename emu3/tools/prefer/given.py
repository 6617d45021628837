"""Pairs of images that people compared, from Parquet files of Pick-a-Pic's columns.

``caption, jpg_0, jpg_1, label_0, label_1``: the image of the larger label is the chosen one, and
equal labels are a tie, which is left out. Each image is encoded once.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from emu3.data.codes import Making, fingerprint
from emu3.data.media import MediaError, read_image
from emu3.data.pairs import Pairs, PairsHeader, joined, load_pairs, save_pairs
from emu3.files import replacing
from emu3.model import Emu3
from emu3.prompt import generation_prompt
from emu3.tools.bulk import Item, Outcome, Report, each, from_input
from emu3.tools.prefer.votes import HUMAN
from emu3.tools.prepare.columns import open_parquet, row_groups
from emu3.tools.prepare.run import Named
from emu3.train.reference import reference_of
from emu3.vision import preprocess
from emu3.weights import Pretrained

COLUMNS = "caption", "jpg_0", "jpg_1", "label_0", "label_1"
_ROWS, _GROUP = 16, 256
"""Rows that are read at a time, and those of a part of the work."""
TIES, SIZES, DAMAGED = "ties", "pairs of two sizes", "damaged rows"

Grid = tuple[int, int]


@dataclass(frozen=True)
class Given:
    """What came of a run."""

    outcome: Outcome
    files: Mapping[Path, int]
    """The files, one for each grid, and their pairs."""
    left_out: Counter[str]


def encode_pairs(
    files: Sequence[Path],
    out: Path,
    loaded: Pretrained,
    making: Making,
    *,
    decoder: str,
    reference: Callable[[], Emu3] | None = None,
) -> Given:
    """Write ``out/dpo-HxW.safetensors`` for each grid of codes.

    Parts that are there are skipped, so a stopped run goes on. Under torchrun each process makes
    its share of the parts, and the first one the files.

    Args:
        files: Parquet files.
        out: the folder to fill.
        loaded: encodes, tokenizes, and is the reference.
        making: sizes of the images.
        decoder: fingerprint of the weights of ``loaded.model``.
        reference: gives the same model in float32, in eval mode; None takes ``loaded.model``.

    Raises:
        ValueError: one line, if a file has other columns, or there is no pair.
    """
    run = _Encode(out, loaded, making, decoder, reference)
    items = []
    for path in files:
        columns = set(open_parquet(path).schema_arrow.names)
        if missing := [name for name in COLUMNS if name not in columns]:
            raise ValueError(f"prefer: {path} must have the columns {', '.join(missing)}")
        groups = row_groups(path, _GROUP)
        names = [PurePath(f"{path.stem}-{number:05}") for number in range(len(groups))]
        run.groups.update(zip(map(str, names), groups, strict=True))
        items += [Item(path, name) for name in names]
    if len(run.groups) < len(items):
        raise ValueError("prefer: files must have different names, got two of one name")
    outcome = each(items, lambda item: None, run.work, run.is_done)
    merges = not outcome.errors and os.environ.get("RANK", "0") == "0"
    return Given(outcome, run.merge(items) if merges else {}, run.left_out)


@dataclass(frozen=True)
class _Encode:
    out: Path
    loaded: Pretrained
    making: Making
    decoder: str
    load_reference: Callable[[], Emu3] | None
    groups: dict[str, list[int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @cached_property
    def reference(self) -> Emu3:
        return self.loaded.model if self.load_reference is None else self.load_reference()

    @cached_property
    def header(self) -> PairsHeader:
        vision, words = fingerprint(self.loaded.vision), self.loaded.text.vocabulary
        return PairsHeader(vocabulary=words, vision=vision, voters=(HUMAN,), decoder=self.decoder)

    @property
    def _settings(self) -> str:
        return f"{self.header.model_dump_json()} {self.making.model_dump_json()}\n"

    def is_done(self, item: Item) -> bool:
        done = self._done(item)
        if done.exists() and done.read_text() != self._settings:
            raise ValueError(f"prefer: {done} is of other weights or sizes: choose another folder")
        return done.exists()

    def work(self, item: Item, given: None, report: Report) -> None:
        found: dict[Grid, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
        for number, (prompt, *images) in enumerate(self._rows(item), 1):
            report(f"pair {number}")
            chosen, rejected = map(self._encoded, images)
            found[tuple(chosen.shape)].append((prompt, chosen, rejected))
        for grid, rows in found.items():
            report("reference")
            pairs = self._pairs(grid, rows)
            reference = reference_of(self.reference, pairs)
            path = self._part(item, grid)
            save_pairs(path, replace(pairs, reference=reference))
        with replacing(self._done(item)) as draft:  # last: then all parts are there
            draft.write_text(self._settings)

    def merge(self, items: Sequence[Item]) -> dict[Path, int]:
        """Write the pairs of each grid to one file."""
        parts = defaultdict(list)
        for item in items:
            if not self._done(item).exists():
                raise ValueError(f"prefer: {item.name} failed in another process: run it again")
            for path in sorted((self.out / "pairs").glob(f"{item.name}.*x*.safetensors")):
                parts[path.suffixes[-2]].append(load_pairs(path))
        if not parts:
            raise ValueError("prefer: no row has two images of one size, of which one was chosen")
        files = {}
        for grid, found in sorted(parts.items()):
            path = self.out / f"dpo-{grid[1:]}.safetensors"
            save_pairs(path, joined(found))
            files[path] = sum(map(len, found))
        return files

    def _done(self, item: Item) -> Path:
        return self.out / "pairs" / f"{item.name}.done"

    def _part(self, item: Item, grid: Grid) -> Path:
        return self.out / "pairs" / f"{item.name}.{grid[0]}x{grid[1]}.safetensors"

    def _rows(self, item: Item) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Prompts, and pixels of the chosen and the rejected image."""
        groups, file = self.groups[str(item.name)], open_parquet(item.source)
        first = sum(file.metadata.row_group(group).num_rows for group in range(groups[0]))
        how = {"row_groups": groups, "columns": list(COLUMNS)}
        records = (
            record for rows in file.iter_batches(_ROWS, **how) for record in rows.to_pylist()
        )
        for number, record in enumerate(from_input(records), first):
            labels = record["label_0"], record["label_1"]
            if None in labels or labels[0] == labels[1]:
                self.left_out[TIES] += 1
                continue
            names = sorted(("jpg_0", "jpg_1"), key=lambda n: -labels[int(n[-1])])
            try:
                where = f"{item.source}, row {number}"
                images = [self._pixels(record[name], f"{where}, {name}") for name in names]
            except (MediaError, ValueError, TypeError):
                self.left_out[DAMAGED] += 1
                continue
            if images[0].shape != images[1].shape:
                self.left_out[SIZES] += 1
                continue
            yield record["caption"], *images

    def _pixels(self, value: Any, origin: str) -> Tensor:
        data = value.get("bytes") if isinstance(value, Mapping) else value
        how, image = self.making, read_image(Named(data, origin))
        rows = image.permute(1, 2, 0)
        return preprocess(rows, min_pixels=how.min_pixels, max_pixels=how.max_pixels)

    def _encoded(self, pixels: Tensor) -> Tensor:
        vision = self.loaded.vision
        return vision.encode(pixels[None].to(vision.codebook.device))[0].cpu().short()

    def _pairs(self, grid: Grid, rows: Sequence[tuple[str, Tensor, Tensor]]) -> Pairs:
        prompts, chosen, rejected = zip(*rows, strict=True)
        ids = [generation_prompt(prompt, grid, self.loaded.text) for prompt in prompts]
        votes = torch.tensor([[[1.0], [0.0]]]).expand(len(rows), 2, 1)
        return Pairs(
            self.header,
            prompts,
            [torch.tensor(one, dtype=torch.int32) for one in ids],
            torch.stack(chosen),
            torch.stack(rejected),
            votes,
            votes.sum(2),
        )
