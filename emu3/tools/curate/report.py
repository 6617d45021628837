"""A page of one file: what was kept, histograms, and samples on both sides of every threshold."""

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from emu3.files import replacing
from emu3.tools.curate.decide import DAMAGE, KINDS, SCORES, Row, outside
from emu3.tools.curate.frames import images_of
from emu3.tools.curate.histogram import histogram
from emu3.tools.curate.settings import CurateSettings, Filters, Range

REPORT = "report.html"
_SAMPLES = 6
"""On each side of a threshold."""
_SHOWN = 12
"""Of the rows that are kept, and of duplicates."""
_ERRORS = 200
_HEIGHT = 110
_READERS = 4
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
  color: #1a1f26; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .5rem 0; }
figure { margin: 0; max-width: 14rem; font-size: 12px; overflow-wrap: anywhere; }
figure img { display: block; height: 110px; max-width: 14rem; object-fit: contain;
  border-bottom: 4px solid var(--side); background: #eee; }
.kept { --side: #1f77b4; } .dropped { --side: #d1495b; } .other { --side: #c9ced6; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; background: var(--side);
  margin-right: .35rem; }
.unread { width: 110px; height: 110px; background: #eee; }
p.note { color: #5b6470; margin: .2rem 0; } code { font-size: 13px; }
"""


def write_report(
    out: Path, rows: Sequence[Row], voters: Sequence[str], settings: CurateSettings
) -> None:
    """Write ``report.html``, which has its images inside."""
    page = _Page(rows, voters, settings)
    body = "\n".join(page.parts())
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>emu3 curate</title><style>{_STYLE}</style><body>{body}</body></html>"
    )
    with replacing(out / REPORT) as draft:
        draft.write_text(html, encoding="utf-8")


class _Page:
    def __init__(
        self, rows: Sequence[Row], voters: Sequence[str], settings: CurateSettings
    ) -> None:
        self._rows, self._settings = rows, settings
        self._names = [*SCORES, *DAMAGE, *voters]
        self._images: dict[str, str] = {}

    def parts(self) -> Iterator[str]:
        yield "<h1>Curation</h1>"
        yield _totals(self._rows)
        yield _key()
        for kind in KINDS:
            of_kind = [row for row in self._rows if row["kind"] == kind and not row["error"]]
            if of_kind:
                yield f"<h2>{'Images' if kind == 'image' else 'Clips'}</h2>"
                yield from self._kind(of_kind, self._settings.filters(kind))
        yield from _errors([row for row in self._rows if row["error"]])

    def _kind(self, rows: Sequence[Row], filters: Filters) -> Iterator[str]:
        for name in self._names:
            values = [row[name] for row in rows if row.get(name) is not None]
            if values and (name in filters or len(set(values)) > 1):
                yield from self._score(rows, name, filters.get(name))
        duplicates = [row for row in rows if row["duplicate_of"]]
        if duplicates:
            yield f"<h3>Near-duplicates: {len(duplicates):,}</h3>"
            by_id = {row["id"]: row for row in rows}
            pairs = [(by_id[row["duplicate_of"]], row) for row in duplicates[: _SHOWN // 2]]
            yield self._figures([row for pair in pairs for row in pair], "hash")
        kept = [row for row in rows if row["keep"]]
        if kept:
            yield "<h3>Some that are kept</h3>"
            places = range(0, len(kept), max(1, len(kept) // _SHOWN))
            yield self._figures([kept[place] for place in places][:_SHOWN], None)

    def _score(self, rows: Sequence[Row], name: str, allowed: Range | None) -> Iterator[str]:
        said = _in_words(allowed)
        yield f"<h3>{escape(name)}{': ' + said if said else ''}</h3>"
        scored = [row for row in rows if row.get(name) is not None]
        sides = [_side(row, name, allowed) for row in scored]
        limits = [] if allowed is None else [allowed.min, allowed.max]
        limits = [limit for limit in limits if limit is not None]
        yield histogram([row[name] for row in scored], sides, limits)
        if missing := len(rows) - len(scored):
            yield f'<p class="note">not measured: {missing:,}</p>'
        for limit in limits:
            below = sorted((r for r in scored if r[name] < limit), key=lambda r: -r[name])
            above = sorted((r for r in scored if r[name] >= limit), key=lambda r: r[name])
            sides = (f"below {limit:g}", below[:_SAMPLES][::-1]), ("from it on", above[:_SAMPLES])
            for words, near in sides:
                yield f'<p class="note">{words}{"" if near else ": none"}</p>'
                yield self._figures(near, name, allowed)

    def _figures(self, rows: Sequence[Row], name: str | None, allowed: Range | None = None) -> str:
        new = [row for row in rows if row["id"] not in self._images]
        with ThreadPoolExecutor(_READERS) as pool:
            self._images.update(zip([r["id"] for r in new], pool.map(_thumbnail, new), strict=True))
        return f'<div class="row">{"".join(self._figure(r, name, allowed) for r in rows)}</div>'

    def _figure(self, row: Row, name: str | None, allowed: Range | None) -> str:
        side = _side(row, name, allowed) if allowed else "kept" if row["keep"] else "dropped"
        value = row[name] if name else row["caption"] or row["words"] or ""
        value = f"{value:.4g}" if isinstance(value, float) else escape(str(value)[:200])
        reasons = escape("; ".join(row["reasons"]) or "kept")
        return (
            f'<figure class="{side}" title="{reasons}">{self._images[row["id"]]}'
            f"{value}<br>{escape(row['id'])}</figure>"
        )


def _side(row: Row, name: str, allowed: Range | None) -> str:
    """Kept, dropped by this range, or by others alone."""
    if row["keep"]:
        return "kept"
    reasons = "" if allowed is None else outside(name, row[name], allowed)
    return "dropped" if reasons and reasons in row["reasons"] else "other"


def _in_words(allowed: Range | None) -> str:
    if allowed is None:
        return ""
    ends = [f"at least {allowed.min:g}"] if allowed.min is not None else []
    ends += [f"at most {allowed.max:g}"] if allowed.max is not None else []
    unless = [f"{name} {_in_words(of)}" for name, of in allowed.unless.items()]
    return ", ".join(ends) + (f", unless {' and '.join(unless)}" if unless else "")


def _key() -> str:
    names = ("kept", "kept"), ("dropped", "dropped by this range"), ("other", "dropped by others")
    spans = (f'<span class="{side}"><i></i>{words}</span>' for side, words in names)
    return f'<p class="key">{"".join(spans)}</p>'


def _totals(rows: Sequence[Row]) -> str:
    head = ("", "found", "unreadable", "kept", "share", "hours kept")
    lines = [f"<tr>{''.join(f'<th class=number>{cell}</th>' for cell in head)}</tr>"]
    for kind, words in (("image", "images"), ("clip", "clips")):
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        kept = [row for row in of_kind if row["keep"]]
        hours = sum(row["seconds"] or 0 for row in kept) / 3600
        unread = sum(row["error"] is not None for row in of_kind)
        cells = f"{len(of_kind):,}", f"{unread:,}", f"{len(kept):,}"
        cells += f"{len(kept) / len(of_kind):.1%}", f"{hours:.3g}" if kind == "clip" else ""
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{words}</th>{numbers}</tr>")
    reasons = Counter(reason.split()[0] for row in rows for reason in row["reasons"])
    words = {"shows": "near-duplicate"}
    told = ", ".join(f"{words.get(name, name)} {n:,}" for name, n in reasons.most_common())
    return f"<table>{''.join(lines)}</table>" + (f"<p>Dropped for: {told}</p>" if told else "")


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        yield f"<h2>Unreadable: {len(rows):,}</h2><ul>"
        yield from (f"<li><code>{escape(row['error'])}</code></li>" for row in rows[:_ERRORS])
        yield "</ul>"


def _thumbnail(row: Row) -> str:
    """The image, or the frame in the middle of a clip, or a grey square if it is gone."""
    try:
        middle = None if row["kind"] == "image" else [(row["first"] + row["stop"]) // 2]
        (image,) = images_of(row, middle)
    except (OSError, ValueError):
        return '<div class="unread"></div>'
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((4 * _HEIGHT, _HEIGHT), Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
