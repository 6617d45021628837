"""An evaluation as one HTML file that needs no other."""

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor

from emu3.data.media import read_image
from emu3.tools.evaluate.answers import Answered
from emu3.tools.evaluate.generation import Judged
from emu3.tools.evaluate.reconstruction import Reconstructed
from emu3.tools.look import is_video

_WIDEST = 384
"""Pixels of the longer edge of an image on the page."""
_ANSWERS = 24
_FRECHET = "Fréchet distance by CLIP"
_CSS = """
:root { color-scheme: light dark; --line: #8884; --good: #2a9d6f; --bad: #d1495b; --bar: #4a90d9 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2.2em }
table { border-collapse: collapse; margin: .8em 0 }
td, th { padding: .25em .9em .25em 0; text-align: left; border-bottom: 1px solid var(--line) }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .7em; background: var(--bar); border-radius: 2px }
.images { display: flex; flex-wrap: wrap; gap: 12px }
figure { margin: 0; width: 160px } figure.pair { width: 332px }
figure img { width: 160px; image-rendering: auto } figcaption { font-size: 12px }
.good { color: var(--good) } .bad { color: var(--bad) } .small { font-size: 12px; opacity: .75 }
"""


def page_of(
    title: str,
    report: Mapping,
    reconstructed: Reconstructed | None,
    judged: Judged | None,
    answered: Answered | None,
    folder: Path | None,
) -> str:
    """The page; ``folder`` has the files of the questions."""
    sections = []
    if reconstructed is not None:
        sections.append(_reconstruction(report["reconstruction"], reconstructed))
    if judged is not None:
        sections.append(_generation(report["generation"], judged))
    if answered is not None:
        sections.append(_answers(report["answers"], answered, folder))
    if "perplexity" in report:
        sections.append(_perplexity(report["perplexity"]))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_CSS}</style>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</html>\n"
    )


def _reconstruction(report: Mapping, found: Reconstructed) -> str:
    rows = [("files", report["files"]), ("frames", report["frames"])]
    rows += [("codes used", report["codes_used"])]
    if report["failed_files"]:
        rows.append(("files that failed", report["failed_files"]))
    if report["exact_files"]:
        rows.append(("files without an error, not in the mean of PSNR", report["exact_files"]))
    units = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "frechet_clip": _FRECHET}
    rows += [(words, report[name]) for name, words in units.items() if name in report]
    known = {one["file"]: one for one in report["of_each"]}
    figures = []
    for name, one, other in found.shown:
        psnr = known[name]["psnr"] if name in known else None
        told = "equal" if psnr is None else f"{psnr:.2f} dB"
        figures.append(_figure([one, other], f"{name}: {told}", "pair"))
    return _section("Reconstruction", _table(rows), "Original and reconstruction.", figures)


def _generation(report: Mapping, judged: Judged) -> str:
    head = ["judge", "mean", "own prompt highest"]
    rows = [
        (name, of["mean"], of.get("choice_accuracy", "")) for name, of in report["judges"].items()
    ]
    parts = [_table(rows, head), _by_tag(report["judges"])]
    if "frechet_clip" in report:
        parts.append(_table([(_FRECHET, report["frechet_clip"])]))
    figures = []
    for number, image in sorted(judged.shown.items()):
        scores = ", ".join(f"{_short(name)} {of[number]:.3g}" for name, of in judged.scores.items())
        figures.append(_figure([image], f"{judged.lines[number].prompt}: {scores}"))
    return _section("Generation", "".join(parts), f"{report['images']} images.", figures)


def _by_tag(judges: Mapping[str, Mapping]) -> str:
    """A row for each tag, a column for each judge, and one more where it compared prompts."""
    columns = {}
    for name, of in judges.items():
        columns[_short(name)] = of["by_tag"]
        columns[f"{_short(name)}, own highest"] = of.get("choice_accuracy_by_tag", {})
    columns = {name: of for name, of in columns.items() if of}
    tags = sorted({tag for of in columns.values() for tag in of})
    rows = [(tag, *(of.get(tag, "") for of in columns.values())) for tag in tags]
    return _table(rows, ["", *columns]) if rows else ""


def _short(judge: str) -> str:
    """``digit`` of a function in a module, ``clip`` of a folder."""
    kind, _, what = judge.partition(":")
    return kind if "/" in what else what


def _answers(report: Mapping, answered: Answered, folder: Path | None) -> str:
    rows = [("accuracy", report["accuracy"]), ("questions", report["questions"])]
    rows += report["by_tag"].items()
    right = answered.right
    # Wrong answers first: they are what is looked for.
    numbers = sorted(range(len(right)), key=lambda number: right[number])[:_ANSWERS]
    figures = []
    for number in numbers:
        line, answer = answered.lines[number], answered.answers[number]
        paths = [(folder or Path()) / path for path in line.shown]
        images = [read_image(path) for path in paths if not is_video(path)]
        expected = "" if right[number] else f" (right: {escape(' or '.join(line.answers))})"
        kind = "good" if right[number] else "bad"
        words = f'{escape(line.question)} <b class="{kind}">{escape(answer.strip())}</b>{expected}'
        figures.append(_figure(images, words, is_html=True))
    told = f"{sum(right)} of {len(right)} answers are right; wrong ones come first."
    return _section("Answers", _table(rows), told, figures)


def _perplexity(report: Mapping) -> str:
    parts = {name: of for name, of in report.items() if isinstance(of, Mapping)}
    most = max(of["loss"] for of in parts.values()) or 1.0
    rows = [
        (
            name,
            "none" if of["perplexity"] is None else of["perplexity"],
            of["loss"],
            of["tokens"],
            _Html(
                f'<span class="bar" style="width:{max(0, 240 * of["loss"] / most):.0f}px"></span>'
            ),
        )
        for name, of in parts.items()
    ]
    left_out = f", {report['left_out']} left out" if report["left_out"] else ""
    told = f"{report['documents']} documents{left_out}."
    head = ["tokens of", "perplexity", "loss, nats", "tokens", ""]
    return _section("Perplexity", _table(rows, head), told, [])


class _Html(str):
    """A cell that is not escaped."""


def _section(title: str, body: str, told: str, figures: Sequence[str]) -> str:
    images = f'<div class="images">{"".join(figures)}</div>' if figures else ""
    return f'<h2>{escape(title)}</h2>{body}<p class="small">{escape(told)}</p>{images}'


def _table(rows: Iterable[Sequence], head: Sequence[str] = ()) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>"


def _cell(value: object) -> str:
    if isinstance(value, _Html):
        return f"<td>{value}</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    return f"<td>{escape(str(value))}</td>"


def _figure(images: Sequence[Tensor], words: str, kind: str = "", *, is_html: bool = False) -> str:
    shown = " ".join(f'<img src="{_data_url(image)}" alt="">' for image in images)
    told = words if is_html else escape(words)
    return f'<figure class="{kind}">{shown}<figcaption>{told}</figcaption></figure>'


def _data_url(image: Tensor) -> str:
    """An image ``[3, H, W]`` uint8 in the page itself: PNG if it is small, JPEG otherwise."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    is_small = max(picture.size) <= _WIDEST // 2
    picture.thumbnail((_WIDEST, _WIDEST), Image.Resampling.LANCZOS)
    if max(picture.size) < 160:
        grow = -(-160 // max(picture.size))
        size = (picture.width * grow, picture.height * grow)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 88}))
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
