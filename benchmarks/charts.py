"""Charts of results: time beside peers and bound, memory, and how the losses grow."""

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import tables

# Of Okabe and Ito's palette, which colour-blind readers tell apart.
OURS, PEER, BOUND = "#0072B2", "#BBBBBB", "#D55E00"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vP"
COLUMNS, PANEL_WIDTH, BAR_HEIGHT = 3, 5.0, 0.28
SHORT_AXIS = 200
"""From the lowest figure to the highest, times: longer axes have room for powers of ten alone."""
MIN_POINTS = 3
"""Sizes that differ in one figure alone, from which a line is drawn."""

Rows = dict[str, list[dict]]
Panel = tuple[str, dict[str, float], float | None]
"""A title, a figure for each contestant, ours first, and the bound."""


def draw(results: Path, by_op: Rows) -> list[str]:
    """Write the charts that there are rows for; return the Markdown that shows them."""
    drawn = {
        "time.png": (
            "Time of each op beside its peers and its bound",
            bars(times(by_op), ms, True),
        ),
        "memory.png": ("Peak memory beside the peers", bars(memories(by_op), mib, False)),
        "scaling.png": ("Time and memory as the size grows", lines(sweeps(by_op))),
    }
    pages = ["## Charts\n"]
    for name, (title, figure) in drawn.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(str(results / name))
            pages.append(f"![{title}]({name})\n")
    return pages if len(pages) > 1 else []


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def mib(value: float) -> str:
    return f"{value:,.0f} MiB"


def largest(by_op: Rows) -> Iterator[dict]:
    """Yield the longest row of every op and direction, on as many threads as were timed."""
    for rows in by_op.values():
        for direction in dict.fromkeys(row["direction"] for row in rows):
            these = [row for row in rows if row["direction"] == direction and timed(row)]
            if these:
                yield max(these, key=lambda row: (row["threads"], row["ms"]))


def timed(row: dict) -> bool:
    return bool(row["peers"])


def times(by_op: Rows) -> list[Panel]:
    return [
        (title(row), {who: who_stands["ms"] for who, who_stands in standings(row)}, bound(row))
        for row in largest(by_op)
    ]


def memories(by_op: Rows) -> list[Panel]:
    panels = []
    for row in largest(by_op):
        held = {who: s["peak_mib"] for who, s in standings(row) if s["peak_mib"] is not None}
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
    return row["bound"] and row["bound"]["fraction"] * row["ms"]


def bars(panels: list[Panel], written: Callable[[float], str], log: bool) -> Figure | None:
    """Draw a panel of horizontal bars for each of ``panels``."""
    if not panels:
        return None
    num_rows = ceil(len(panels) / COLUMNS)
    tallest = max(len(figures) for _, figures, _ in panels)
    height = num_rows * (BAR_HEIGHT * tallest + 1.0)
    figure = Figure(figsize=(PANEL_WIDTH * COLUMNS, height), dpi=100, layout="constrained")
    axes = list(figure.subplots(num_rows, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        bars_of_panel(axis, panel, written, log)
        axis.set_ylim(tallest - 0.5, -0.5)  # bars of one height in all panels
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    what = "MEASURED time of one call" if log else "MEASURED peak memory of one call"
    line = "; line: BOUND" if any(panel[2] for panel in panels) else ""
    figure.suptitle(f"{what}; blue: ours{line}", fontsize=12)
    return figure


def bars_of_panel(axis: Axes, panel: Panel, written: Callable[[float], str], log: bool) -> None:
    heading, figures, bound = panel
    names, values = list(figures), list(figures.values())
    axis.set_title(heading, fontsize=9, loc="left")
    colors = [OURS] + [PEER] * (len(names) - 1)
    if log:
        lowest = min([*values, *([bound] if bound else [])]) / 2
        axis.set_xscale("log")
        # Room for the figures beside the longest bar.
        axis.set_xlim(lowest, max(values) * (max(values) / lowest) ** 0.35)
        label_log(axis.xaxis, written)
    else:
        axis.set_xlim(0, 1.35 * max(values))
        axis.set_xticks([])  # every bar has its figure
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
    """Find rows of an op whose sizes differ in one figure alone: title, that figure, the rows."""
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
            lines_of_panel(axis, name, rows, quantity, written)
        time_axis.set_title(f"{heading}: time", fontsize=9, loc="left")
        memory_axis.set_title(f"{heading}: peak memory", fontsize=9, loc="left")
        handles, labels = time_axis.get_legend_handles_labels()
        memory_axis.legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("MEASURED as one size grows; dashed: BOUND", fontsize=12)
    return figure


def lines_of_panel(
    axis: Axes, name: str, rows: list[dict], quantity: str, written: Callable[[float], str]
) -> None:
    sizes = [row["size"][name] for row in rows]
    everyone = ["ours", *dict.fromkeys(who for row in rows for who in row["peers"])]
    for index, who in enumerate(everyone):
        values = [dict(standings(row)).get(who, {}).get(quantity) for row in rows]
        if all(value is None or value == 0 for value in values):
            continue
        axis.plot(
            *(sizes, [value or float("nan") for value in values]),
            color=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2.4 if index == 0 else 1.4,
            zorder=3 if index == 0 else 2,
            label=who,
        )
    if quantity == "ms" and all(row["bound"] for row in rows):
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
