"""``emu3 curate``."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import Device, app, say, usable
from emu3.settings import merge, override, parse, read_toml

_NEEDED = ("cv2", "scenedetect", "rapidocr", "onnxruntime", "pyarrow")


@app.command()
def curate(
    out: Annotated[Path, typer.Option(help="folder of scores, manifest and report")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="folders, tars, images and videos; none decides again"),
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="TOML file of settings")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="one setting, such as videos.text.max=0.1; may be repeated"),
    ] = None,
    voter: Annotated[
        list[str] | None,
        typer.Option(help="aesthetic:FOLDER, clip:FOLDER, hpsv2:FOLDER or module:function"),
    ] = None,
    device: Annotated[Device, typer.Option(help="device of voters")] = Device.cpu,
    captions: Annotated[
        str | None, typer.Option(help="endpoint for captions, such as http://localhost:8000/v1")
    ] = None,
    captioner: Annotated[str, typer.Option(help="its model")] = "default",
) -> None:
    """Score images and videos, keep those in the ranges of the settings, and caption them.

    Videos are cut into clips without a cut inside. manifest.parquet has a row for each image and
    clip, with its scores and what it was dropped for; kept.jsonl is an input of emu3 prepare;
    report.html has histograms and samples. A stopped run continues. A file that cannot be read is
    told in one line and in the manifest; the exit code is then 1. Under torchrun each process
    makes its share. OPENAI_API_KEY is sent to the endpoint.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"curate: install emu3-kernels[curate], which has {', '.join(missing)}")
    # Imported here: OpenCV and PyArrow are slow to import.
    from emu3.tools.curate.run import Captioner, curate
    from emu3.tools.curate.settings import CurateSettings

    tree = CurateSettings().model_dump(exclude_none=True)
    if settings is not None and not settings.is_file():
        raise ValueError(f"curate: no file {settings}")
    given = read_toml(settings.absolute(), settings.parent) if settings else {}
    for word in change or ():
        override(given, word)
    chosen = parse(CurateSettings, merge(tree, given))
    key = os.environ.get("OPENAI_API_KEY")
    asked = Captioner(captions, captioner, key) if captions else None
    is_first = int(os.environ.get("RANK", 0)) == 0
    run = curate(
        inputs or (),
        out,
        chosen,
        voters=voter or (),
        device=usable(device),
        captioner=asked,
        is_first=is_first,
    )
    bad = [row["error"] for row in run.rows if row["error"]]
    if is_first:
        _summary(run, out, len(bad))
    if bad or run.errors:
        raise typer.Exit(1)


def _summary(run, out: Path, bad: int) -> None:
    from emu3.tools.bulk import in_words
    from emu3.tools.curate.manifest import KEPT, MANIFEST
    from emu3.tools.curate.report import REPORT

    unread = f", {bad} unreadable" if bad else ""
    if run.passed_over:
        say(f"passed over: {in_words(run.passed_over)}")
    say(f"{run.measured} files measured, {run.skipped} measured before{unread}")
    for kind, words in (("image", "images"), ("clip", "clips")):
        of_kind = [row for row in run.rows if row["kind"] == kind and not row["error"]]
        if of_kind:
            say(f"{sum(row['keep'] for row in of_kind):,} of {len(of_kind):,} {words} kept")
    if run.spent is not None:
        captioned = sum(bool(row["keep"] and row["caption"]) for row in run.rows)
        cap = f"; {run.unaffordable:,} not asked for: caption.max_cost" if run.unaffordable else ""
        say(f"{captioned:,} captions, which cost {run.spent:.4g}{cap}")
    say(f"wrote {MANIFEST}, {KEPT} and {REPORT} to {out}")
