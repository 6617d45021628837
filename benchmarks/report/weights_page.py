"""The page of weights in 8 and 4 bits: what they cost and save."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAGE, PICTURE = "weights.md", "weights.png"
COLORS = {"bf16": "#BBBBBB", "int8": "#0072B2", "int4": "#E69F00"}
ACCURACIES = ("generated_digit", "generated_color", "caption_digit", "caption_color")
HEAD = """# Weights in 8 and 4 bits

Written by `python -m benchmarks weights --demo demo`, on {cpu}, {threads} threads, level {level}.
int8 has a scale for each output, int4 one for 64 inputs; activations are bfloat16 everywhere.
"""


def write(folder: Path, found: Mapping[str, Any]) -> Path:
    facts = found["machine"]
    parts = [
        HEAD.format(cpu=facts["cpu"], threads=found["threads"], level=facts["cpu_level"]),
        _matrices(found["matrices"]),
        _decode(found["decode"]),
    ]
    if found["miniature"]:
        parts.append(_miniature(found["miniature"]))
        parts.append(f"![Logit error, accuracy and speed by kind of weights]({PICTURE})\n")
        FigureCanvasAgg(_figure(found)).print_png(str(folder / PICTURE))
    (folder / PAGE).write_text("\n".join(parts))
    return folder / PAGE


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _matrices(rows: list[dict]) -> str:
    names = list(rows[0]["ms"])
    body = [
        [
            " x ".join(map(str, row["shape"])),
            *(f"{row['ms'][name]:.2f} ms, {row['gb_per_s'][name]:.1f} GB/s" for name in names),
        ]
        for row in rows
    ]
    head = ["rows x inputs x outputs", *names]
    return (
        f"## One matrix\n\nMEASURED, interleaved; read: of the bf16 weight.\n\n{_table(head, body)}"
    )


def _decode(found: Mapping[str, Mapping[str, float]]) -> str:
    plain = found["bf16"]
    body = [
        [
            name,
            f"{one['bytes'] / 1e6:,.0f} MB ({one['bytes'] / plain['bytes']:.2f}x)",
            f"{one['ms']:.1f} ms",
            f"{one['tokens_per_s']:.2f} ({one['tokens_per_s'] / plain['tokens_per_s']:.2f}x)",
            f"{one['gb_per_s']:.1f}",
        ]
        for name, one in found.items()
    ]
    head = ("weights", "bytes a token, COUNTED", "a step, MEASURED", "tokens a second", "GB/s")
    return (
        "## A decoded token\n\nTwo layers of Emu3-8B and the visual rows of its head, a guidance "
        f"pair, context 1,024.\n\n{_table(head, body)}"
    )


def _miniature(found: Mapping[str, Mapping[str, float]]) -> str:
    body = [
        [
            name,
            f"{one['logit_error']:.2%}",
            *(f"{one[f'{kind}_accuracy']:.1%}" for kind in ACCURACIES),
        ]
        for name, one in found.items()
    ]
    head = ["weights", "logit error", *(kind.replace("_", " ") for kind in ACCURACIES)]
    return (
        "## The miniature\n\nMEASURED: the error of its visual logits against float64, root mean "
        "square over their standard deviation, and what the demo's judges find.\n\n"
        + _table(head, body)
    )


def _figure(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    errors, accuracies, speeds = figure.subplots(1, 3, width_ratios=(1, 2, 1))
    mini, decoded = found["miniature"], found["decode"]
    percent = {name: 100 * one["logit_error"] for name, one in mini.items()}
    speed = {name: one["tokens_per_s"] for name, one in decoded.items()}
    for axis, title, values in (
        (errors, "logit error, % (float64 truth)", percent),
        (speeds, "tokens a second, 2 layers of 8B", speed),
    ):
        bars = axis.bar(list(values), list(values.values()), color=[COLORS[k] for k in values])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
    for i, (name, one) in enumerate(mini.items()):
        places = [x + 0.27 * (i - 1) for x in range(len(ACCURACIES))]
        heights = [100 * one[f"{kind}_accuracy"] for kind in ACCURACIES]
        bars = accuracies.bar(places, heights, width=0.25, color=COLORS[name], label=name)
        accuracies.bar_label(bars, fmt="%.1f", fontsize=8)
    accuracies.set_xticks(range(len(ACCURACIES)), [k.replace("_", "\n") for k in ACCURACIES])
    accuracies.set_title("accuracy of the miniature, %")
    accuracies.set_ylim(0, 110)
    accuracies.legend(loc="lower right")
    return figure
