"""``emu3 profile``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from emu3.cli.common import Device, Dtype, app, say, usable
from emu3.config import load_model


@app.command()
def profile(
    overrides: Annotated[list[str] | None, typer.Argument(help="such as num_layers=2")] = None,
    preset: Annotated[str, typer.Option(help="shape of the model: 8b or mini")] = "8b",
    context: Annotated[int, typer.Option(help="tokens of the longest decode", min=1)] = 131072,
    prefill: Annotated[int, typer.Option(help="tokens of the longest prompt", min=1)] = 8192,
    rows: Annotated[int, typer.Option(help="of the batch: 2 are an image with guidance")] = 2,
    against: Annotated[str | None, typer.Option(help="attention backend to compare with")] = None,
    dtype: Annotated[Dtype, typer.Option(help="of weights and cache")] = Dtype.bfloat16,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("profile"),
) -> None:
    """Profile a prefill and a guided decode by op, with random weights."""
    # Imported here: matplotlib is slow to import.
    from emu3.tools.profile.report import write_report
    from emu3.tools.profile.run import run_profile

    found = run_profile(
        load_model(preset, overrides or ()),
        context=context,
        prefill=prefill,
        out=out,
        rows=rows,
        against=against,
        dtype=getattr(torch, dtype.value),
        device=usable(device),
    )
    write_report(found, out)
    say(f"wrote {out}/profile.md, profile.json, time_per_token.png and trace.json")
