"""The run of ``emu3 prepare``: units to shards, each rank its own."""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePath
from tempfile import NamedTemporaryFile

from rich.console import Console
from torch import Tensor

from emu3.data.codes import Header as CodesHeader
from emu3.data.codes import Making, fingerprint, load_codes
from emu3.data.compose import chat_document, parts_document
from emu3.data.media import Video, open_video, read_image
from emu3.data.store import IDX, Document, Provenance, read_header, write_shard
from emu3.prompt import Clip, Part
from emu3.templates import Turn
from emu3.text import QwenTokenizer, TextTokenizer
from emu3.tools.bulk import Item, Outcome, Report, ahead, each, from_input, is_out_of_memory
from emu3.tools.prepare.inputs import Unit, units_of
from emu3.tools.prepare.records import CODES, Medium, Sample
from emu3.tools.tokenize import encode_video
from emu3.vision import VisionTokenizer, preprocess


def prepare(
    inputs: Sequence[Path],
    out: Path,
    text: TextTokenizer,
    vision: VisionTokenizer | None,
    making: Making,
    *,
    size: int = 16384,
    overwrite: bool = False,
) -> tuple[Outcome, list[str]]:
    """Write a shard of the store ``out`` for every unit of ``inputs``.

    Shards that are there are skipped, so a stopped run can be continued and a store appended to;
    both give the store of one run. Under torchrun each process makes its share.

    Args:
        vision: encodes images and videos, and must be the one that made codes given as files; None
            where there are none, or only Emu3's own files of codes.
        size: samples of a shard, about.
        overwrite: make shards again that are there.

    Returns:
        The outcome for the shards, and a line for each sample that this process left out.

    Raises:
        ValueError: a shard in ``out`` has other settings or was made of other contents.
    """
    if vision is not None and vision.settings.num_codes != text.vocabulary.num_visual:
        raise ValueError(
            f"prepare: the vision tokenizer must have {text.vocabulary.num_visual} codes, as the "
            f"vocabulary, got {vision.settings.num_codes}"
        )
    units = {unit.name: unit for unit in units_of(inputs, size)}
    run = _Prepare(out, units, text, vision, making)
    run.check_store(replaced=units.keys() if overwrite else ())

    def is_done(item: Item) -> bool:
        return not overwrite and run.is_done(item)

    items = [Item(unit.source, PurePath(unit.name)) for unit in units.values()]
    return each(items, lambda item: None, run.work, is_done), run.left_out


def text_fingerprint(text: TextTokenizer) -> str:
    """``bytes``, or 16 hexadecimal digits of Qwen's merges."""
    if isinstance(text, QwenTokenizer):
        return hashlib.sha256(text.as_tiktoken()).hexdigest()[:16]
    return "bytes"


@dataclass(frozen=True)
class _Prepare:
    out: Path
    units: dict[str, Unit]
    text: TextTokenizer
    vision: VisionTokenizer | None
    making: Making
    left_out: list[str] = field(default_factory=list)

    @cached_property
    def tokenizers(self) -> dict[str, str | None]:
        vision = None if self.vision is None else fingerprint(self.vision)
        return {"text": text_fingerprint(self.text), "vision": vision}

    def check_store(self, replaced: Collection[str]) -> None:
        """Shards of other tokenizers would spoil the store."""
        names = [path.name.removesuffix(IDX) for path in self.out.glob(f"*{IDX}")]
        for name in set(names) - set(replaced):
            made = read_header(self.out / name).made
            both = made.vision, self.tokenizers["vision"]
            same = (made.vocabulary, made.text) == (self.text.vocabulary, self.tokenizers["text"])
            if not same or (None not in both and both[0] != both[1]):
                raise ValueError(
                    f"prepare: {self.out / name} was made with other tokenizers: choose another "
                    "folder"
                )

    def is_done(self, item: Item) -> bool:
        prefix = self.out / item.name
        if not os.path.exists(f"{prefix}{IDX}"):
            return False
        found, wanted = read_header(prefix).made, self._made(self.units[str(item.name)])
        for name in ("vocabulary", "text", "vision", "making", "digest"):
            if getattr(found, name) != getattr(wanted, name):
                what = "contents" if name == "digest" else f"{name} settings"
                raise ValueError(
                    f"{prefix}{IDX} was made of other {what}: choose another folder or overwrite"
                )
        return True

    def work(self, item: Item, given: None, report: Report) -> None:
        unit = self.units[str(item.name)]
        left_out: list[str] = []
        try:
            documents = self._documents(unit, report, left_out)
            write_shard(self.out / item.name, documents, self._made(unit), left_out)
        finally:
            self.left_out.extend(left_out)

    def _made(self, unit: Unit) -> Provenance:
        return Provenance(
            source=unit.name,
            digest=unit.digest,
            vocabulary=self.text.vocabulary,
            making=self.making,
            **self.tokenizers,
        )

    def _documents(self, unit: Unit, report: Report, left_out: list[str]) -> Iterator[Document]:
        """A sample that fails costs a line; an input that breaks off costs the shard."""
        samples = from_input(unit.samples())
        for number, (sample, reading) in enumerate(ahead(self._read, samples), 1):
            report(f"sample {number}")
            try:
                yield self._document(sample, reading)
            except _SampleError as failure:
                left_out.append(failure.line)
                say = Console(stderr=True).print
                say(f"emu3: {failure.line}", markup=False, emoji=False, soft_wrap=True)

    def _document(self, sample: Sample, reading: Future) -> Document:
        if sample.error is not None:
            raise _SampleError(sample.error)
        try:
            read = reading.result()
            if sample.made is not None:
                return self._same_tokenizers(sample)
            if isinstance(read, Document):
                return read
            parts, turns = read
            turns = [Turn(list(map(self._encoded, turn.said)), turn.answer) for turn in turns]
            return self._composed(list(map(self._encoded, parts)), turns)
        except Exception as error:
            if is_out_of_memory(error):
                line = "too large for the memory: prepare it with a lower --max-pixels"
            elif isinstance(error, ValueError | OSError):
                line = " ".join(str(error).split())
            else:
                line = " ".join(f"{type(error).__name__}: {error}".split())
            origin = sample.origin
            raise _SampleError(line if origin in line else f"{origin}: {line}") from error

    def _same_tokenizers(self, sample: Sample) -> Document:
        text, vision = sample.tokenizers
        if vision is not None:
            self._needs_vision()
        if (text, vision or self.tokenizers["vision"]) != tuple(self.tokenizers.values()):
            raise ValueError("is of other tokenizers")
        return sample.made

    def _composed(self, parts: Sequence[Part], turns: Sequence[Turn]) -> Document:
        return chat_document(turns, self.text) if turns else parts_document(parts, self.text)

    def _read(self, sample: Sample) -> Document | tuple[Sequence, Sequence[Turn]]:
        """Parts and turns with pixels, opened videos and codes in place of files; in threads.

        Of texts alone the document: merges need no lock of Python's.
        """
        shown = [*sample.parts, *(part for turn in sample.turns for part in turn.said)]
        if shown and all(isinstance(part, str) for part in shown):
            return self._composed(sample.parts, sample.turns)
        parts = [self._opened(part, sample.origin) for part in sample.parts]
        turns = [
            Turn([self._opened(part, sample.origin) for part in turn.said], turn.answer)
            for turn in sample.turns
        ]
        return parts, turns

    def _opened(self, part: Part | Medium, origin: str) -> "Part | Video | _Pixels | Medium":
        if not isinstance(part, Medium):
            return part
        data = part.data
        if isinstance(data, Tensor):
            return data
        if isinstance(data, Path) and data.suffix.lower() == CODES:
            return self._codes(*load_codes(data), data)
        self._needs_vision()
        if part.is_video:
            return self._video(data, part.span) if isinstance(data, Path) else part
        source = data if isinstance(data, Path) else Named(data, origin)
        return _Pixels(self._pixels(read_image(source)))

    def _video(self, path: Path, span: tuple[float, float] | None) -> Video:
        return open_video(path, Fraction(self.making.fps) if self.making.fps else None, span)

    def _codes(self, codes: Tensor, header: CodesHeader, path: Path) -> Tensor | Clip:
        self._needs_vision()
        if header.tokenizer != self.tokenizers["vision"]:
            raise ValueError(f"codes: {path} is of another tokenizer")
        if header.fps is None:
            return codes
        return Clip(codes, Fraction(header.fps), self.vision.settings.temporal_factor)

    def _encoded(self, part: "Part | Video | _Pixels | Medium") -> Part:
        if isinstance(part, _Pixels):
            return self.vision.encode(self._on_device(part.values[None]))[0].cpu()
        if isinstance(part, Medium):
            # FFmpeg may have to go back in a file.
            with NamedTemporaryFile() as file:
                file.write(part.data)
                file.flush()
                return self._encoded(self._video(Path(file.name), part.span))
        if isinstance(part, Video):
            frames = (self._on_device(self._pixels(frame)) for frame in from_input(part))
            codes = encode_video(self.vision, frames, self.making.clips).cpu()
            return Clip(codes, part.fps, self.vision.settings.temporal_factor)
        return part

    def _needs_vision(self) -> None:
        if self.vision is None:
            raise ValueError("has images: name their vision tokenizer with --vision")

    def _pixels(self, image: Tensor) -> Tensor:
        how = self.making
        rows = image.permute(1, 2, 0)
        return preprocess(rows, min_pixels=how.min_pixels, max_pixels=how.max_pixels)

    def _on_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.vision.codebook.device)


@dataclass(frozen=True)
class _Pixels:
    """An image to be encoded."""

    values: Tensor


class _SampleError(Exception):
    """A sample that cannot become a document."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line


class Named(BytesIO):
    """Bytes that errors name by their origin."""

    def __init__(self, data: bytes, origin: str) -> None:
        super().__init__(data)
        self.origin = origin

    def __str__(self) -> str:
        return self.origin
