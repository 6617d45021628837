"""``emu3 demo | redraw | train``."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import app, say
from emu3.tasks import load_recipe
from emu3.tasks import train as train_recipe


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="folder to fill; demo, or demo/stages or demo/tune with those options"),
    ] = None,
    video: Annotated[
        bool, typer.Option("--video", help="moving digits too: generate and continue clips, answer")
    ] = False,
    stages: Annotated[
        bool, typer.Option("--stages", help="pre-training in two stages, from token stores")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="quality, preferences and instructions after training")
    ] = False,
    processes: Annotated[int, typer.Option(help="of each stage, with --stages", min=1)] = 1,
) -> None:
    """Train the miniature on handwritten digits, generate, caption, and report."""
    # Imported here: matplotlib is slow to import and no other command needs it.
    from emu3.demo.run import run_demo
    from emu3.demo.run_stages import run_stages

    if tune and (stages or video):
        raise ValueError("demo: --tune trains on images alone, and takes no --stages or --video")
    if stages and video:
        raise ValueError("demo: --stages trains on clips too, and takes no --video")
    if processes > 1 and not stages:
        raise ValueError(f"demo: only --stages takes --processes, got {processes}")
    if stages:
        run_stages(out or Path("demo/stages"), processes=processes)
    elif tune:
        # Imported here: FSDP is slow to import and no other demo needs it.
        from emu3.demo.run_tune import run_tune

        run_tune(out or Path("demo/tune"))
    else:
        run_demo(out or Path("demo"), video=video)


@app.command()
def redraw(
    overrides: Annotated[list[str] | None, typer.Argument(help="settings as key=value")] = None,
    recipe: Annotated[str, typer.Option(help="a TOML file, or a recipe that ships")] = "tokenizer",
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("demo/tokenizer"),
) -> None:
    """Train a vision tokenizer, reconstruct validation files, and report PSNR and SSIM."""
    from emu3.demo.redraw import run_redraw

    run_redraw(out, recipe, overrides or ())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a TOML file, or a recipe that ships: digits …")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings as key=value")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/new"),
    resume: Annotated[bool, typer.Option(help="continue from the last checkpoint")] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="weights to start from: train.start")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="train nothing: say what memory and time it would take")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="of the plan, if not the mesh's")] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="GB of a GPU, if not the card's")
    ] = None,
    card: Annotated[str, typer.Option(help="GPU of the plan; an unknown one lists all")] = "h100",
    suggest: Annotated[
        bool, typer.Option("--suggest", help="meshes that fit, with --plan")
    ] = False,
) -> None:
    """Train from a recipe, or plan the training.

    A recipe of the stage "pretrain" also runs on many processes: torchrun -m emu3 train RECIPE. A
    plan that does not fit is refused; it needs no GPU, and no store.
    """
    words = [*(overrides or ()), *([f"train.start={json.dumps(str(start))}"] if start else ())]
    settings = load_recipe(recipe, words)
    if plan:
        # Imported here: FSDP is slow to import and no other command needs it.
        from emu3.train.plan import run_plan

        run_plan(settings, gpus=gpus, memory=memory, card=card, suggest=suggest)
        return
    weights = train_recipe(settings, out, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        say(f"wrote {weights}")
