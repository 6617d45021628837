"""Rows of results as tables: a line for ours, then a line for each peer."""

from collections.abc import Iterable

from rich.table import Table

from benchmarks.harness.results import size_order

HEADER = (
    *("size", "dtype", "direction", "on", "entry"),
    *("MEASURED ms", "times ours (range)", "COUNTED / MEASURED", "of BOUND", "MEASURED MiB"),
)
NUM_TEXT_COLUMNS = 5
"""Columns of text; the rest are numbers."""
HOST_HEADER = (
    *("op", "size", "dtype", "direction", "MEASURED us", "range", "of an empty node"),
    *("calls", "launches"),
)


def lines(rows: Iterable[dict]) -> list[list[str]]:
    """Return a line of cells for ours and for every peer of every row."""
    return [cells for row in ordered(rows) for cells in entries(row)]


def ordered(rows: Iterable[dict]) -> list[dict]:
    return sorted(
        rows, key=lambda r: (size_order(r), r["dtype"], r["direction"], r["threads"] or 0)
    )


def entries(row: dict) -> list[list[str]]:
    case = [size(row), row["dtype"], row["direction"], where(row)]
    ours = [*case, f"**{row['backend']}**", *numbers(row, "1")]
    theirs = [[*case, name, *numbers(peer, ratio(peer))] for name, peer in row["peers"].items()]
    return [ours, *theirs]


def numbers(standing: dict, times_ours: str) -> list[str]:
    fraction, peak = standing.get("of_bound"), standing.get("peak_mib")
    return [
        f"{standing['ms']:.3g}" if "ms" in standing else "-",
        times_ours,
        rate(standing),
        "-" if fraction is None else f"{fraction:.2f}",
        "-" if peak is None else f"{peak:,.1f}",
    ]


def size(row: dict) -> str:
    """Write the numbers of a size; a share or a switch by name, unless it is off."""
    stated = row["size"].items()
    numbers = [str(v) for _, v in stated if not isinstance(v, (bool, float))]
    switches = [f"{k} {v}" for k, v in stated if isinstance(v, (bool, float)) and v]
    return ", ".join([" x ".join(numbers), *switches])


def where(row: dict) -> str:
    return "GPU" if row.get("device") == "cuda" else f"{row['threads']} thr."


def rate(standing: dict) -> str:
    if "tokens_per_s" in standing:
        return f"{standing['tokens_per_s']:.0f} tokens/s"
    if "gb_s" in standing:
        return f"{standing['gb_s']:,.1f} GB/s"
    if "tflop_s" in standing:
        return f"{standing['tflop_s']:.2f} TFLOP/s"
    return "-"


def ratio(peer: dict | None) -> str:
    """Write the median of the paired ratios with their range, if it was measured."""
    if peer is None or "ratio" not in peer:
        return "-"
    if "min" not in peer["ratio"]:
        return f"{peer['ratio']['median']:.2f}x"
    return "{median:.2f}x ({min:.2f}-{max:.2f})".format(**peer["ratio"])


def absent(rows: Iterable[dict]) -> dict[str, str]:
    """Name the peers that are missing in some row, and why."""
    return {
        f"{name} ({row['direction']})": why for row in rows for name, why in row["missing"].items()
    }


def calls(rows: Iterable[dict]) -> list[str]:
    """Return a sentence on the cost of the call itself for every small row."""
    return [
        f"A call on {size(row)}, {where(row)}, takes {row['above_empty_us']:.1f} us more than an "
        "empty native call."
        for row in ordered(rows)
        if "above_empty_us" in row
    ]


def host_line(row: dict) -> list[str]:
    """Return the cells of a row of host time."""
    return [
        *(row["op"], size(row), row["dtype"], row["direction"]),
        *(f"{1e3 * row['ms']:.1f}", " - ".join(f"{1e3 * ms:.1f}" for ms in row["range_ms"])),
        f"{1e3 * row['empty_ms']:.1f}" if "empty_ms" in row else "-",
        *(str(row["calls"]), str(row["launches"])),
    ]


def as_table(op: str, rows: list[dict]) -> Table:
    """Lay the rows of one op out for a terminal."""
    table = Table(title=f"{op}: time of a peer over ours, median (range) of paired ratios")
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="left" if index < NUM_TEXT_COLUMNS else "right")
    for cells in lines(rows):
        table.add_row(*(cell.replace("**", "") for cell in cells))
    table.caption = "\n".join(
        [*calls(rows), *(f"not timed: {name}: {why}" for name, why in absent(rows).items())]
    )
    return table


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    header = list(header)
    grid = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in grid) + "\n"
