"""``python -m benchmarks codegen``: machine code of our GPU kernels, and of Liger-Kernel's."""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import calibration, machine, prediction
from benchmarks.harness.prediction import CARDS, MODEL
from benchmarks.peers import codegen as peers_codegen
from emu3_kernels.ops import OPS
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.codegen import Row, by_config, rows_of_op
from emu3_kernels.testing.terms import listed


def table(rows: Iterable[Row]) -> Table:
    out = Table(
        title="COUNTED in the machine code; accesses are count x bytes a thread; us are PREDICTED"
    )
    for column in ("op", "kernel", "config", "target"):
        out.add_column(column, no_wrap=True)
    for column in ("registers", "stack", "spills", "shared", "loads", "stores", "matrix", "async"):
        out.add_column(column, justify="right", no_wrap=True)
    for column in ("programs", "per SM", "waves", "us"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("contract")
    for row in rows:
        facts = row.facts
        numbers = (facts.registers, facts.stack, facts.spills, facts.shared)
        counts = (facts.loads, facts.stores, facts.matrix_ops)
        out.add_row(
            *(row.op, row.kernel, row.config, row.target),
            *(str(n) for n in numbers),
            *(listed(c) for c in counts),
            str(facts.async_copies),
            *_on_a_card(row),
            _verdict(row),
        )
    return out


def _on_a_card(row: Row) -> tuple[str, str, str, str]:
    """Write programs, those that an SM holds, waves and the time on the last card of the target."""
    card = next((c for c in reversed(CARDS.values()) if c.target == row.target), None)
    if card is None:
        return str(row.programs), str(row.resident), "-", "-"
    work = calibration.work_of(asdict(row))
    us = prediction.microseconds(work, card, MODEL) if prediction.is_known(work) else None
    return (
        *(str(row.programs), str(row.resident), f"{prediction.waves(work, card):.2f}"),
        "-" if us is None else f"{us:.0f}",
    )


def _verdict(row: Row) -> str:
    if not row.held:
        return "none"
    excuses = [f"[yellow]excused {line}" for line in row.excused]
    return "\n".join([*(f"[red]{line}" for line in row.broken), *excuses]) or "[green]kept"


def codegen(
    op: Annotated[list[str] | None, typer.Option(help="Op to compile; all by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    peers: Annotated[bool, typer.Option(help="Count Liger-Kernel's kernels beside ours.")] = False,
) -> None:
    """Compile every Triton kernel for every target and check its contract; no GPU needed."""
    ops = op or list(OPS)
    if unknown := sorted(set(ops) - set(OPS)):
        raise typer.BadParameter(f"--op must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    rows = rows_beside(ops, peers)
    # A narrow terminal wraps whole lines; a column that is cut short cannot be read.
    Console(width=max(Console().width, 210)).print(table(rows))
    if json_path:
        write(json_path, rows)
    if any(row.broken for row in rows):
        raise typer.Exit(1)


def rows_beside(ops: Iterable[str], peers: bool) -> list[Row]:
    """Count as ``count`` does, in a process for each core, then Liger-Kernel's if ``peers``.

    A process compiles what one op launches for one target at a time.
    """
    counters = [rows_of_op, peers_codegen.rows_of_op] if peers else [rows_of_op]
    with ProcessPoolExecutor(machine.cores(), get_context("spawn")) as pool:
        asked = [
            [pool.submit(counter, op, target) for target in CHIPS]
            for counter, op in product(counters, ops)
        ]
        return [row for futures in asked for row in by_config(f.result() for f in futures)]


def write(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` as ``report`` reads them."""
    stated = {"label": "COUNTED", "triton": triton.__version__}
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{json.dumps(stated)[:-1]}, "rows": [\n{lines}\n]}}\n')
