"""Charts of results: time beside peers and bound, memory, and how the losses grow."""

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.report import tables

# Okabe and Ito's palette, safe for colour-blind readers.
OURS, PEER, BOUND = "#0072B2", "#BBBBBB", "#D55E00"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vP"
COLUMNS, PANEL_WIDTH, BAR_HEIGHT = 3, 5.0, 0.28  # inches
SHORT_AXIS = 200
"""Ratio of the ends of an axis up to which 1, 2 and 5 are labelled; then powers of ten alone."""
MIN_POINTS = 3
"""Fewest sizes that make a line."""

Rows = dict[str, list[dict]]
Panel = tuple[str, dict[str, float], float | None]
"""A title, a value for each entry, ours first, and the bound."""


def draw(folder: Path, machine: str, by_op: Rows) -> list[str]:
    """Write the charts that have rows as ``MACHINE-NAME.png``; return Markdown that shows them."""
    charts = {
        "time": ("Time of each op beside its peers and its bound", bars(times(by_op), ms, True)),
        "memory": ("Peak memory beside the peers", bars(memories(by_op), mib, False)),
        "scaling": ("Time and memory as the size grows", lines(sweeps(by_op))),
    }
    shown = ["## Charts\n"]
    for name, (title, figure) in charts.items():
        if figure is not None:
            path = folder / f"{machine}-{name}.png"
            FigureCanvasAgg(figure).print_png(str(path))
            shown.append(f"![{title}]({path.name})\n")
    return shown if len(shown) > 1 else []


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def mib(value: float) -> str:
    return f"{value:,.0f} MiB"


def largest(by_op: Rows) -> Iterator[dict]:
    """Yield the longest row of every op and direction, on the most threads."""
    for rows in by_op.values():
        for direction in dict.fromkeys(row["direction"] for row in rows):
            these = [row for row in rows if row["direction"] == direction and compared(row)]
            if these:
                yield max(these, key=lambda row: (row["threads"] or 0, row["ms"]))


def compared(row: dict) -> bool:
    """Say whether the times of ours and of a peer are known."""
    return "ms" in row and any("ms" in peer for peer in row["peers"].values())


def times(by_op: Rows) -> list[Panel]:
    return [
        (title(row), {name: s["ms"] for name, s in standings(row) if "ms" in s}, bound(row))
        for row in largest(by_op)
    ]


def memories(by_op: Rows) -> list[Panel]:
    panels = []
    for row in largest(by_op):
        held = {name: s["peak_mib"] for name, s in standings(row) if s.get("peak_mib") is not None}
        if max(held.values(), default=0) >= 1:
            panels.append((title(row), held, None))
    return panels


def title(row: dict) -> str:
    return (
        f"{row['op']}, {row['direction']}\n{tables.size(row)} {row['dtype']}, {tables.where(row)}"
    )


def standings(row: dict) -> list[tuple[str, dict]]:
    return [("ours", row), *row["peers"].items()]


def bound(row: dict) -> float | None:
    return row["bound"]["fraction"] * row["ms"] if row.get("bound") else None


def bars(panels: list[Panel], written: Callable[[float], str], log: bool) -> Figure | None:
    """Draw a panel of horizontal bars for each of ``panels``."""
    if not panels:
        return None
    num_rows = ceil(len(panels) / COLUMNS)
    tallest = max(len(values) for _, values, _ in panels)
    height = num_rows * (BAR_HEIGHT * tallest + 1.0)
    figure = Figure(figsize=(PANEL_WIDTH * COLUMNS, height), dpi=100, layout="constrained")
    axes = list(figure.subplots(num_rows, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        panel_of_bars(axis, panel, written, log)
        axis.set_ylim(tallest - 0.5, -0.5)  # bars of one height in all panels
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    what = "MEASURED time of one call" if log else "MEASURED peak memory of one call"
    line = "; line: BOUND" if any(panel[2] for panel in panels) else ""
    figure.suptitle(f"{what}; blue: ours{line}", fontsize=12)
    return figure


def panel_of_bars(axis: Axes, panel: Panel, written: Callable[[float], str], log: bool) -> None:
    heading, by_name, bound = panel
    names, values = list(by_name), list(by_name.values())
    axis.set_title(heading, fontsize=9, loc="left")
    colors = [OURS] + [PEER] * (len(names) - 1)
    if log:
        lowest = min([*values, *([bound] if bound else [])]) / 2
        axis.set_xscale("log")
        # Leaves room for the number beside the longest bar.
        axis.set_xlim(lowest, max(values) * (max(values) / lowest) ** 0.35)
        label_log(axis.xaxis, written)
    else:
        axis.set_xlim(0, 1.35 * max(values))
        axis.set_xticks([])  # every bar has its number
    axis.barh(names, values, color=colors, height=0.72)
    for index, value in enumerate(values):
        weight = "bold" if index == 0 else "normal"
        axis.annotate(
            written(value),
            (value, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight=weight,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    if bound:
        axis.axvline(bound, color=BOUND, linewidth=1.6)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def label_log(axis: Axis, written: Callable[[float], str]) -> None:
    """Label a logarithmic axis at 1, 2 and 5 where it is short, else at powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < SHORT_AXIS else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def sweeps(by_op: Rows) -> list[tuple[str, str, list[dict]]]:
    """Find rows of an op whose sizes differ in one number: title, name of the number, the rows."""
    found = []
    for op, rows in by_op.items():
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            for name, value in row["size"].items():
                if isinstance(value, int) and not isinstance(value, bool):
                    others = tuple((k, str(v)) for k, v in row["size"].items() if k != name)
                    key = (name, others, row["direction"], row["dtype"], tables.where(row))
                    groups.setdefault((*key, row["backend"]), []).append(row)
        for (name, others, direction, _, where, _), these in groups.items():
            if len(these) >= MIN_POINTS:
                fixed = ", ".join(f"{k} {v}" for k, v in others if v not in ("0.0", "False"))
                ordered = sorted(these, key=lambda row: row["size"][name])
                found.append((f"{op}, {direction}\n{fixed}, {where}", name, ordered))
    return found


def lines(found: list[tuple[str, str, list[dict]]]) -> Figure | None:
    """Draw time and memory of every sweep side by side."""
    if not found:
        return None
    figure = Figure(figsize=(11, 3.1 * len(found) + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (time_axis, memory_axis), (heading, name, rows) in zip(axes, found, strict=True):
        for axis, quantity, written in ((time_axis, "ms", ms), (memory_axis, "peak_mib", mib)):
            panel_of_lines(axis, name, rows, quantity, written)
        time_axis.set_title(f"{heading}: time", fontsize=9, loc="left")
        memory_axis.set_title(f"{heading}: peak memory", fontsize=9, loc="left")
        handles, labels = time_axis.get_legend_handles_labels()
        memory_axis.legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("MEASURED time and memory as one size grows; dashed: BOUND", fontsize=12)
    return figure


def panel_of_lines(
    axis: Axes, name: str, rows: list[dict], quantity: str, written: Callable[[float], str]
) -> None:
    sizes = [row["size"][name] for row in rows]
    names = ["ours", *dict.fromkeys(peer for row in rows for peer in row["peers"])]
    for index, entry in enumerate(names):
        values = [dict(standings(row)).get(entry, {}).get(quantity) for row in rows]
        if all(value is None or value == 0 for value in values):
            continue
        axis.plot(
            *(sizes, [value or float("nan") for value in values]),
            color=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2.4 if index == 0 else 1.4,
            zorder=3 if index == 0 else 2,
            label=entry,
        )
    if quantity == "ms" and all(row.get("bound") for row in rows):
        axis.plot(sizes, [bound(row) for row in rows], "--", color=BOUND, label="BOUND")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_formatter(NullFormatter())
    label_log(axis.yaxis, written)
    axis.set_xlabel(name, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
