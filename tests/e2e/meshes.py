"""Train on every mesh of eight processes and compare with one process, both with float64.

    python -m tests.e2e.meshes

Five clipped AdamW steps in float32 of packed rows whose documents straddle shards, with weighted
tokens and dropout of 0.1. A row is a mesh and its errors against float64: the largest of the
losses and of the gradient norms, and the mean and the largest of the weights after the last step.
Exit code 0 if no mesh makes more than twice the error of one process (of the weights, the mean).
"""

import time
from contextlib import closing
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.ranks import Ranks
from tests.train import mesh_cases as cases

WORLD = 8
COLUMNS = "loss", "norm", "mean weight", "largest weight"


def meshes() -> list[dict]:
    """All factorings of 8 into shard x context x tensor, with either context style; replicas."""
    powers = [1, 2, 4, 8]
    found = [
        {"shard": shard, "context": context, "tensor": tensor, "context_style": style}
        for shard in powers
        for context in powers
        for tensor in powers
        for style in (("ulysses", "ring") if context > 1 else ("ulysses",))
        if shard * context * tensor == WORLD
    ]
    return [*found, {"replicate": 2, "context": 2, "tensor": 2}, {"replicate": 4, "shard": 2}]


def main(steps: Annotated[int, typer.Option(help="Steps of each run.")] = cases.STEPS) -> None:
    console, wrong = Console(width=120), []
    alone, exact = (cases.train_alone(dtype, steps) for dtype in (torch.float32, torch.float64))
    table = Table("replicate", "shard", "context", "tensor", "style", *COLUMNS, "s")
    _add(table, ["one process", "", "", "", ""], alone.errors(exact), "")
    with closing(Ranks(WORLD)) as ranks:
        for sizes in meshes():
            began = time.perf_counter()
            results = ranks.run(cases.train_on_with, sizes, {"steps": steps})
            seconds = f"{time.perf_counter() - began:.1f}"
            names = [str(sizes.get(n, 1)) for n in ("replicate", "shard", "context", "tensor")]
            style = sizes.get("context_style", "ulysses") if sizes.get("context", 1) > 1 else ""
            _add(table, [*names, style], results[0].errors(exact), seconds)
            try:
                results[0].assert_as_accurate(alone, exact)
            except AssertionError as error:
                wrong.append(f"{sizes}: {error}")
    console.print(table)
    for line in wrong:
        console.print(line)
    raise typer.Exit(bool(wrong))


def _add(table: Table, mesh: list[str], errors: dict[str, float], seconds: str) -> None:
    table.add_row(*mesh, *(f"{error:.1e}" for error in errors.values()), seconds)


if __name__ == "__main__":
    typer.run(main)
