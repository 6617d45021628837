"""Rows of results as tables: one line a contestant, ours first, every column labelled."""

from collections.abc import Iterable

from rich.table import Table

HEADER = (
    *("size", "dtype", "direction", "on", "who"),
    *("MEASURED ms", "times ours (range)", "COUNTED / MEASURED", "of BOUND", "MEASURED MiB"),
)
LEFT = 5
"""Columns of words; the rest are figures."""


def lines(rows: Iterable[dict]) -> list[list[str]]:
    """Return a line of cells for ours and for every peer of every row."""
    return [cells for row in ordered(rows) for cells in contestants(row)]


def ordered(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda r: (*size_key(r), r["dtype"], r["direction"], r["threads"]))


def size_key(row: dict) -> tuple:
    """Sort sizes by what they say, numbers as numbers."""
    return tuple(value if isinstance(value, int) else str(value) for value in row["size"].values())


def contestants(row: dict) -> list[list[str]]:
    case = [size(row), row["dtype"], row["direction"], where(row)]
    ours = [*case, f"**{row['backend']}**", *figures(row, "1")]
    theirs = [[*case, who, *figures(peer, ratio(peer))] for who, peer in row["peers"].items()]
    return [ours, *theirs]


def figures(standing: dict, times_ours: str) -> list[str]:
    fraction, peak = standing.get("of_bound"), standing["peak_mib"]
    return [
        f"{standing['ms']:.3g}",
        times_ours,
        rate(standing),
        "-" if fraction is None else f"{fraction:.2f}",
        "-" if peak is None else f"{peak:.1f}",
    ]


def size(row: dict) -> str:
    """Write the numbers of a size, and by name what is a share or a switch and not off."""
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
        return f"{standing['gb_s']:.1f} GB/s"
    if "tflop_s" in standing:
        return f"{standing['tflop_s']:.2f} TFLOP/s"
    return "-"


def ratio(peer: dict | None) -> str:
    if peer is None:
        return "-"
    return "{median:.2f}x ({min:.2f}-{max:.2f})".format(**peer["ratio"])


def absent(rows: Iterable[dict]) -> dict[str, str]:
    """Name who was not timed in some row, and why."""
    return {
        f"{who} ({row['direction']})": why for row in rows for who, why in row["missing"].items()
    }


def calls(rows: Iterable[dict]) -> list[str]:
    """Say of every small row how much longer a call takes than one that computes nothing."""
    return [
        f"MEASURED: a call on {size(row)}, {where(row)}, takes {row['above_empty_us']:.1f} us more "
        "than a native call on no rows."
        for row in ordered(rows)
        if "above_empty_us" in row
    ]


def as_table(op: str, rows: list[dict]) -> Table:
    """Lay the rows of one op out for a terminal."""
    table = Table(title=f"{op}: peers as times of ours, median (range) of paired ratios")
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="left" if index < LEFT else "right")
    for cells in lines(rows):
        table.add_row(*(cell.replace("**", "") for cell in cells))
    table.caption = "\n".join(
        [*calls(rows), *(f"not timed: {who}: {why}" for who, why in absent(rows).items())]
    )
    return table


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    header = list(header)
    grid = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in grid) + "\n"
