"""The run of ``emu3 curate``: files to scores, scores to decisions, kept rows to captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from emu3.data.media import MediaError, read_image
from emu3.tools.bulk import Item, Report, each, in_utf8, is_out_of_memory
from emu3.tools.curate.decide import Row, check_filters, decide
from emu3.tools.curate.inputs import File, files_of, opened, words_of
from emu3.tools.curate.journal import Journal, names_of
from emu3.tools.curate.manifest import COLUMNS, new_row, read_manifest, write_manifest
from emu3.tools.curate.measure import image_row, video_rows
from emu3.tools.curate.passes import CAPTIONS, caption, fill, fill_captions, vote, voter_column
from emu3.tools.curate.report import write_report
from emu3.tools.curate.settings import CurateSettings, MeasureSettings, digest_of
from emu3.voters import load_voter

_MEASURES = "measures"


@dataclass(frozen=True)
class Captioner:
    """An endpoint of OpenAI's form."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)


@dataclass
class Curated:
    """What a run found and did."""

    measured: int
    """Files, by this rank; others were measured before."""
    skipped: int
    rows: list[Row]
    errors: list[str]
    """Of votes and captions; files that cannot be read are rows with an ``error``."""
    spent: float | None = None
    unaffordable: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)


def curate(
    inputs: Sequence[Path],
    out: Path,
    settings: CurateSettings,
    *,
    voters: Sequence[str] = (),
    device: str = "cpu",
    captioner: Captioner | None = None,
    is_first: bool = True,
) -> Curated:
    """Measure what is not measured yet, decide, and write manifest, kept rows and report.

    Every file, vote and caption is stored once it is there, so that a killed run continues. Under
    torchrun each process measures its share, and the first one writes.

    Args:
        inputs: folders, tars and files; none decides again about the rows of the manifest.
        voters: names of ``load_voter``.

    Raises:
        ValueError: one line, for inputs or settings that cannot be meant.
        OSError: the disk is full, or the endpoint of captions fails.
    """
    columns = _columns(out, [voter_column(name) for name in voters])
    check_filters(settings, columns)
    loaded = {name: load_voter(name, device) for name in voters}
    run = _measured(inputs, out, settings) if inputs else _read(out, settings)
    legible = [row for row in run.rows if not row["error"]]
    fill_captions(out, legible)
    for name, voter in loaded.items():
        run.errors += vote(out, legible, name, voter).errors
    for column in columns:
        fill(out, legible, column)
    decide(run.rows, settings)
    if captioner is not None:
        kept = [row for row in run.rows if row["keep"]]
        told = caption(out, kept, captioner.url, captioner.model, settings.caption, captioner.key)
        run.errors += told.outcome.errors
        run.spent, run.unaffordable = told.spent, told.unaffordable
    fill_captions(out, legible)
    if is_first:
        write_manifest(out, run.rows, columns, settings)
        write_report(out, run.rows, columns, settings)
    return run


def _columns(out: Path, given: Sequence[str]) -> list[str]:
    """The scores of these voters, and of all that voted before."""
    if len(set(given)) < len(given):
        raise ValueError(f"curate: two voters have one name: {', '.join(given)}")
    if taken := set(given) & {*COLUMNS, _MEASURES, CAPTIONS}:
        raise ValueError(f"curate: a voter may not be named as a column: {', '.join(taken)}")
    return sorted({*given, *names_of(out)} - {_MEASURES, CAPTIONS})


def _read(out: Path, settings: CurateSettings) -> Curated:
    rows, before = read_manifest(out)
    if before.measure != settings.measure:
        raise ValueError("curate: settings of measure have changed: name the inputs, too")
    return Curated(0, 0, rows, [])


def _measured(inputs: Sequence[Path], out: Path, settings: CurateSettings) -> Curated:
    files, passed_over = files_of(inputs)
    made = digest_of(settings.measure)
    journal = Journal(out, _MEASURES)
    measuring = _Measuring(settings.measure, made, journal)
    outcome = each(files, measuring.read, measuring.work, measuring.is_done)
    journal.close()
    # Other ranks wrote theirs meanwhile.
    records = Journal(out, _MEASURES).records
    rows: list[Row] = []
    for file in files:
        record = records[str(file.name)]
        found = record.get("rows") or [_failed(file, record["error"])]
        rows += [new_row(**{**row, **file.where}) for row in found]
    return Curated(outcome.done, outcome.skipped, rows, [], passed_over=passed_over)


def _failed(file: File, error: str) -> Row:
    kind = "clip" if file.is_video else "image"
    return {**file.where, "id": str(file.name), "kind": kind, "error": error}


@dataclass(frozen=True)
class _Measuring:
    how: MeasureSettings
    made: str
    journal: Journal

    def is_done(self, file: Item) -> bool:
        record = self.journal.records.get(str(file.name), {})
        same = (record.get("made"), record.get("stamp")) == (self.made, file.stamp)
        # What failed may have failed for a reason that is gone.
        return same and "rows" in record

    def read(self, file: File) -> "tuple[str, Tensor | None] | Exception":
        try:
            if file.error is not None:
                raise ValueError(file.error)
            if file.is_video:
                return words_of(file), None
            with opened(file.where) as content:
                return words_of(file), read_image(content)
        except Exception as error:
            return error

    def work(self, file: File, given: Any, report: Report) -> None:
        about = {"made": self.made, "stamp": file.stamp}
        try:
            rows = self._rows(file, given, report)
        except Exception as error:
            line = _line(file, error)
            self.journal.add(str(file.name), **about, error=line)
            raise ValueError(line) from error
        self.journal.add(str(file.name), **about, rows=rows)

    def _rows(self, file: File, given: Any, report: Report) -> list[Row]:
        if isinstance(given, Exception):
            raise given
        words, image = given
        if image is not None:
            return [image_row(file, words, image, self.how)]
        with opened(file.where) as content:
            try:
                return video_rows(file, words, content, self.how, report)
            except MediaError as error:
                # A video in a tar is read from a copy.
                raise MediaError(str(error).replace(str(content), str(file.source))) from None


def _line(file: File, error: Exception) -> str:
    if is_out_of_memory(error):
        line = "too large for the memory"
    elif isinstance(error, ValueError | OSError):
        line = " ".join(str(error).split())
    else:
        line = " ".join(f"{type(error).__name__}: {error}".split())
    source = str(in_utf8(file.source))
    return line if source in line or str(file.tar) in line else f"{source}: {line}"
