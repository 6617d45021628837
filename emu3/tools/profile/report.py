"""A profile as Markdown, JSON and a plot."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from emu3.files import replacing
from emu3.tools.profile.run import Breakdown, Profile, Row

SMALLEST_SHARE = 0.005
"""Ops below this share of the time are merged into one row."""


def write_report(found: Profile, out: Path) -> None:
    """Write ``profile.md``, ``profile.json`` and ``time_per_token.png`` into ``out``."""
    with replacing(out / "profile.md") as draft:
        draft.write_text(markdown(found))
    with replacing(out / "profile.json") as draft:
        draft.write_text(json.dumps(as_json(found), indent=1))
    with replacing(out / "time_per_token.png") as draft:
        draw(found, draft)


def markdown(found: Profile) -> str:
    s, machine = found.settings, found.machine
    head = [
        "# Profile",
        "",
        f"{s.num_layers} layers of size {s.hidden_size}, {s.num_heads}/{s.num_kv_heads} heads, "
        f"{str(found.dtype).removeprefix('torch.')}, random weights, {batch_of(found)}. "
        f"Peak memory {found.peak_bytes / 2**30:.2f} GiB (MEASURED). Bounds are BOUND by "
        f"{machine.bytes_per_second / 1e9:.1f} GB/s and "
        f"{machine.flops_per_second / 1e12:.2f} TFLOP/s (MEASURED).",
    ]
    tables = [table(breakdown, found) for breakdown in found.breakdowns]
    return "\n".join([*head, "", by_context(found), by_window(found), launches(found), *tables])


def batch_of(found: Profile) -> str:
    pairs = found.rows // 2
    return f"{found.rows} rows, {pairs} with guidance" if pairs else "one row, no guidance"


def by_context(found: Profile) -> str:
    """Milliseconds of a token, and of a prompt, by context and backend."""
    names = list(found.decode)
    columns = [f"decode, {name} (MEASURED)" for name in names]
    columns += ["decode (BOUND)", *(f"prefill, {name} (MEASURED)" for name in names)]
    lines = [f"| context | {' | '.join(columns)} |", "|---:" * (len(columns) + 1) + "|"]
    for context in found.bounds:
        cells = [found.decode[name].get(context) for name in names]
        cells += [found.bounds[context], *(found.prefill[name].get(context) for name in names)]
        shown = " | ".join("" if c is None else f"{1e3 * c:,.2f} ms" for c in cells)
        lines.append(f"| {context:,} | {shown} |")
    return "\n".join(lines) + "\n"


def by_window(found: Profile) -> str:
    """Milliseconds of a forward by its tokens, for parallel decoding."""
    plain = found.windows[1][0]
    lines = [
        "A forward of T tokens a row at the longest context. Parallel decoding gains where it "
        "accepts more codes a forward than the last column.",
        "",
        "| T | forward (MEASURED) | forward (BOUND) | of a plain one |",
        "|---:|---:|---:|---:|",
    ]
    for num_new, (seconds, bound) in found.windows.items():
        cells = f"{1e3 * seconds:,.2f} ms", f"{1e3 * bound:,.2f} ms", f"{seconds / plain:.2f}"
        lines.append(f"| {num_new} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def launches(found: Profile) -> str:
    """What a GPU launches for a decoded token."""
    if not found.launches:
        return "Launches on a GPU are counted where Triton is installed.\n"
    parts = ", ".join(f"{count:,} {where}" for where, count in found.launches.items())
    return f"Launches of a decoded token on a GPU (COUNTED): {parts}.\n"


def table(breakdown: Breakdown, found: Profile) -> str:
    """The ops of one call, longest first; they add up to its time."""
    large = [row for row in breakdown.rows if row.seconds >= SMALLEST_SHARE * breakdown.seconds]
    small = [row for row in breakdown.rows if row not in large]
    rest = Row(f"{len(small)} others", sum(r.calls for r in small), _sum(small), None)
    lines = [
        f"## {breakdown.title[0].upper()}{breakdown.title[1:]}: {1e3 * breakdown.seconds:,.2f} ms",
        "",
        "| op | calls | time (MEASURED) | share | bytes (COUNTED) | GB/s | of the bound (BOUND) |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_line(row, breakdown.seconds, found) for row in [*large, rest]),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row, total: float, found: Profile) -> str:
    cells = [
        row.name,
        f"{row.calls:,}",
        f"{1e3 * row.seconds:,.3f} ms",
        f"{row.seconds / total:.1%}",
    ]
    if row.cost is not None and row.cost.num_bytes and row.seconds > 0:
        cells.append(f"{row.cost.num_bytes / 1e6:,.1f} MB")
        cells.append(f"{row.cost.num_bytes / row.seconds / 1e9:.1f}")
        cells.append(f"{found.machine.bound(row.cost) / row.seconds:.0%}")
    else:
        cells += [""] * 3
    return f"| {' | '.join(cells)} |"


def _sum(rows: list[Row]) -> float:
    return sum(row.seconds for row in rows)


def as_json(found: Profile) -> dict:
    return {
        "settings": found.settings.model_dump(mode="json"),
        "dtype": str(found.dtype),
        "bytes_per_second": found.machine.bytes_per_second,
        "flops_per_second": found.machine.flops_per_second,
        "peak_bytes": found.peak_bytes,
        "decode_seconds": found.decode,
        "prefill_seconds": found.prefill,
        "decode_bound_seconds": found.bounds,
        "rows": found.rows,
        "window_seconds": {n: seconds for n, (seconds, _) in found.windows.items()},
        "window_bound_seconds": {n: bound for n, (_, bound) in found.windows.items()},
        "launches": found.launches,
        "ops": {
            breakdown.title: [
                {
                    "op": row.name,
                    "calls": row.calls,
                    "seconds": row.seconds,
                    "bytes": row.cost and row.cost.num_bytes,
                    "flops": row.cost and row.cost.flops,
                }
                for row in breakdown.rows
            ]
            for breakdown in found.breakdowns
        },
    }


def draw(found: Profile, path: Path) -> None:
    """Time of a decoded token against the context, with the bound as a line."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, seconds in found.decode.items():
        axes.plot(*_points(seconds), marker="o", label=f"{name} attention, MEASURED")
    axes.plot(*_points(found.bounds), color="black", linestyle="--", label="BOUND")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(found.bounds), [f"{n:,}" for n in found.bounds], rotation=30)
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds per decoded token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _points(seconds: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(seconds), [1e3 * value for value in seconds.values()]
