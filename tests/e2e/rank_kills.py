"""Kill ranks of torchrun in mid-step, in mid-save and at random; compare with the unbroken run.

    python -m tests.e2e.rank_kills --times 20

Exit code 0 if torchrun restarted after every kill, every checkpoint that has its name could be
read, and curve and weights are those of the unbroken run, byte for byte.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch.distributed.checkpoint as dcp
import typer

from emu3.train.sharded import checkpoints
from tests.e2e.dying_rank import Death, write_plan
from tests.train.pretraining import write_data

ROOT = Path(__file__).parents[2]
MESH = ["parallel.shard=2", "parallel.tensor=2"]
RANKS, STEPS = 4, 12
FILES = "metrics.jsonl", "pretrain.safetensors"


def torchrun(num_ranks: int, folder: Path, run: Path, deaths: list[Death], *words: str) -> str:
    """Train ``folder/recipe.toml`` in ``run``; return what torchrun and the ranks printed."""
    write_plan(folder / "plan.json", deaths)
    launch = f"--standalone --nproc-per-node {num_ranks} --max-restarts {len(deaths)}"
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split()]
    command += ["--monitor-interval", "0.1", "-m", "tests.e2e.dying_rank", folder / "plan.json"]
    command += ["train", folder / "recipe.toml", *words, "--out", run]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise AssertionError(f"torchrun ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def faults(run: Path, whole: Path) -> list[str]:
    """Compare what a run left with the unbroken one."""
    found = [name for name in FILES if (run / name).read_bytes() != (whole / name).read_bytes()]
    left = [path.name for path in run.glob("step-*.*")]
    for path in checkpoints(run):
        size = sum(len(entry.chunks) for entry in _tensors(path))
        if not size:
            left.append(f"{path.name} is empty")
    return [f"{name} differs" for name in found] + [f"{name} was left" for name in left]


def _tensors(path: Path) -> list:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.values()
    return [entry for entry in entries if hasattr(entry, "chunks")]


def plan(times: int, chosen: random.Random) -> list[Death]:
    """Draw where each attempt ends; a step has 2 calls of a block, a save 2 to 10 flushes."""
    deaths = []
    for _ in range(times):
        where = chosen.choice(["step", "save", "anywhere"])
        when = chosen.randint(1, 5) if where != "anywhere" else chosen.uniform(4, 12)
        deaths.append(Death(chosen.randrange(RANKS), where, when))
    return deaths


def main(
    times: Annotated[int, typer.Option(help="number of kills")] = 20,
    seed: Annotated[int, typer.Option(help="of who is killed, and where")] = 0,
) -> None:
    """Kill ranks of torchrun in mid-step, in mid-save and at random."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        words = [*MESH, f"train.steps={STEPS}"]
        torchrun(RANKS, folder, folder / "whole", [], *words)
        deaths = plan(times, random.Random(seed))
        torchrun(RANKS, folder, folder / "run", deaths, *words)
        found = faults(folder / "run", folder / "whole")
    for line in found:
        typer.echo(line)
    typer.echo(f"{times} kills, {len(found)} faults")
    raise typer.Exit(bool(found))


if __name__ == "__main__":
    typer.run(main)
