"""Kill ``emu3 curate`` at random moments and inside writes, continue it, and compare.

    python -m tests.e2e.curate_kills --times 100

Exit code 0 if every continued run left the manifest, the kept rows and the report of the unbroken
one, byte for byte, and no file was there in part after any kill.
"""

import random
import shutil
import signal
import tempfile
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Annotated

import typer

from emu3.tools.curate.run import Captioner, curate
from emu3.tools.curate.settings import CurateSettings, MeasureSettings, Range
from tests import children
from tests.curate.endpoint import FakeEndpoint, fake_endpoint
from tests.curate.making import moving, still, write_clip, write_photo
from tests.e2e.jobs import Event, live

FILES = "manifest.parquet", "kept.jsonl", "report.html"
MOST_KILLS = 6
"""Of one run, before it is left alone."""
SETTINGS = CurateSettings(
    measure=MeasureSettings(text=False),
    images={"short_edge": Range(min=100)},
    videos={"flow": Range(min=0.003)},
)


def work(inputs: Path, url: str, out: Path) -> None:
    """Measure, vote and caption."""
    voters = ["tests.curate.test_curate:brightness"]
    curate([inputs], out, SETTINGS, voters=voters, captioner=Captioner(url, "m"))


def make_inputs(folder: Path) -> None:
    for seed in range(12):
        write_photo(folder / f"{seed:02}.png", seed, 90 + 10 * (seed % 3))
    for seed in range(2):
        write_clip(folder / f"{seed}.mp4", moving(seed, 16), still(seed + 50, 16))
    (folder / "bad.jpg").write_bytes(b"no image")


def break_and_continue(
    run: partial, out: Path, whole: Path, events: int, seconds: float, chosen: random.Random
) -> int:
    """Kill a run some times, then let it end, and check it; return how often it was killed."""
    shutil.rmtree(out, ignore_errors=True)
    log, killed = out.with_name("log"), 0
    for _ in range(chosen.randint(1, MOST_KILLS)):
        if chosen.random() < 0.7:
            process, _ = children.start(live, run, out, log, None)
            process.join(chosen.uniform(0, seconds))
            process.kill()
            process.join()
            code = process.exitcode
        else:
            event = Event(chosen.randint(1, events), chosen.random() < 0.5, chosen.random() < 0.5)
            code = children.exit_code(live, run, out, log, event)
        if code != -signal.SIGKILL:
            break
        killed += 1
        for name in FILES:
            path = out / name
            if path.exists() and name == "manifest.parquet":
                assert path.read_bytes() == (whole / name).read_bytes(), f"{name} is not whole"
    code = children.exit_code(live, run, out, log, None)
    assert code == 0, log.read_text()
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    drafts = [path for path in out.rglob("*") if ".part" in str(path)]
    assert not drafts, drafts
    return killed


def kill(times: int, seed: int, folder: Path, endpoint: FakeEndpoint) -> str:
    """Kill ``times`` times in all; return what was done, in words."""
    forkserver.set_forkserver_preload(["tests.e2e.curate_kills"])
    forkserver.ensure_running()
    make_inputs(folder / "in")
    run = partial(work, folder / "in", endpoint.url)
    started = time.perf_counter()
    events = children.run(live, run, folder / "whole", folder / "log", None)
    seconds, requests = time.perf_counter() - started, endpoint.requests
    chosen, killed, runs = random.Random(seed), 0, 0
    while killed < times:
        killed += break_and_continue(run, folder / "out", folder / "whole", events, seconds, chosen)
        runs += 1
        typer.echo(f"{killed} kills, {runs} runs")
    again = endpoint.requests - requests * (runs + 1)
    return (
        f"{killed} kills of {runs} runs of {seconds:.1f} s, each with the files of the unbroken "
        f"one; {again} of {endpoint.requests} captions were asked for again"
    )


def main(
    times: Annotated[int, typer.Option(help="number of kills")] = 20,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    """Kill emu3 curate at random moments and inside writes; compare with the unbroken run."""
    with tempfile.TemporaryDirectory() as folder, fake_endpoint() as endpoint:
        typer.echo(kill(times, seed, Path(folder), endpoint))


if __name__ == "__main__":
    typer.run(main)
