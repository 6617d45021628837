"""The machine code of the GPU kernels as Markdown: for each op what is COUNTED and PREDICTED."""

from collections.abc import Iterable
from operator import attrgetter
from statistics import median

from benchmarks.harness import calibration, prediction
from benchmarks.harness.calibration import Measured
from benchmarks.harness.prediction import CARDS, MODEL
from benchmarks.report import gpu_page, tables

HEADER = (
    *("kernel", "config", "target", "registers", "shared"),
    *("loads", "stores", "matrix opcodes", "async copies", "contract"),
)
PREDICTED_HEADER = (
    *("kernel", "config", "programs", "per SM", "waves"),
    *("bytes an element", "instructions an element", *(f"{card}, µs" for card in CARDS)),
)
OPS_HEADER = ("op", "calls", "median error", "fitted without this op")
TARGET_HEADER = ("op", "size", "direction", "launches", "target µs", "PREDICTED µs")
MEASURED_HEADER = ("op", "size", "direction", "tiles", "MEASURED µs", "PREDICTED µs", "error")

INTRODUCTION = """# Machine code

Without a GPU, by `python -m benchmarks codegen --peers` with Triton {triton}: every kernel is
compiled for every target, ours as `CONFIGS` launches it, Liger-Kernel's as its own host code does.

**COUNTED**: `loads` and `stores` are the accesses of global memory in the code, count x bytes a
thread. `programs`, programs `per SM` and `waves` are those of an H200; an `element` is one of the
largest tensor of the launch. Ours are checked against a contract in `contracts.py`, which gives the
reason of each excused term.

**PREDICTED**: the time of the kernel alone on each card, from what is counted and {num_fitted}
parameters fitted to the calls of the H200 at the end of this page. A time of {launch:.0f} µs is the
fixed part of a launch and says only that the work is short. Kernels of tensor cores whose FLOPs are
not stated have none.
"""

TARGETS = """## Targets of an H200

**PREDICTED** of our Triton kernels, one launch after the other, each with its fixed part, of which
a CUDA graph saves most. Calls of attention that cuDNN takes are faster. Without a number: cuBLAS or
cuDNN take most of the time.
"""

CALIBRATION = """## PREDICTED against MEASURED

Calls MEASURED on an H200 with triton 3.6.0; their kernels are COUNTED as it compiles them.
**Median error {error:.0%}** over {num_calls} calls; {held_out:.0%} when each is predicted by
parameters fitted to all the others. An op that is left out whole shows what the model knows of it
without its own rows: the share of the tensor cores comes from attention alone. Fitted:
{parameters}. Bandwidth and GEMM rate are MEASURED; SMs, clock and limits are the data sheet's, and
so is every rate of another card, times the share of it that the H200 reaches. Calls without an
error take longer than their kernels, for the reason given, and are not fitted.
"""


def page(counted: dict, measured: list[Measured]) -> str:
    rows = counted["rows"]
    introduction = INTRODUCTION.format(
        triton=counted["triton"],
        num_fitted=len(prediction.parameters(MODEL)),
        launch=MODEL.launch_us,
    )
    sections = [
        section(op, [row for row in rows if row["op"] == op])
        for op in dict.fromkeys(row["op"] for row in rows)
    ]
    return "\n".join([introduction, *sections, targets(rows), *calibrated(measured)])


def section(op: str, rows: list[dict]) -> str:
    counted = tables.markdown(HEADER, [cells(row) for row in rows])
    predicted = tables.markdown(PREDICTED_HEADER, predictions(rows))
    return f"## {op}\n\n{predicted}\n{counted}"


def cells(row: dict) -> list[str]:
    facts = row["facts"]
    return [
        *(name(row), row["config"], row["target"]),
        *(str(facts[term]) for term in ("registers", "shared")),
        *(listed(facts[term]) for term in ("loads", "stores", "matrix_ops")),
        *(str(facts["async_copies"]), contract(row)),
    ]


def name(row: dict) -> str:
    return f"**`{row['kernel']}`**" if row["held"] else f"`{row['kernel']}`"


def predictions(rows: list[dict]) -> list[list[str]]:
    """Return a line for each launch on an H200, with its time on every card."""
    launches: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        by_target = launches.setdefault((row["kernel"], row["config"]), {})
        by_target.setdefault(row["target"], []).append(row)
    return [
        predicted_cells(row, {target: same[i] for target, same in by_target.items()})
        for by_target in launches.values()
        for i, row in enumerate(by_target.get(CARDS["H200"].target, ()))
    ]


def predicted_cells(row: dict, by_target: dict[str, dict]) -> list[str]:
    work, card = calibration.work_of(row), CARDS["H200"]
    elements = max(n for name, n in row["sizes"].items() if name.endswith("_ptr"))
    lanes = card.chip.gpu.warp_size
    times = (time(by_target.get(card.target), card) for card in CARDS.values())
    known = prediction.is_known(work)
    executed = prediction.instructions(work, lanes) * lanes / elements
    return [
        *(name(row), row["config"], f"{work.programs:,}", str(row["resident"])),
        *(f"{prediction.waves(work, card):.2f}", f"{row['num_bytes'] / elements:.1f}"),
        *(f"{executed:.1f}" if known else "-", *times),
    ]


def time(row: dict | None, card: prediction.Card) -> str:
    if row is None or not prediction.is_known(work := calibration.work_of(row)):
        return "-"
    return f"{prediction.microseconds(work, card, MODEL):,.0f}"


def targets(rows: list[dict]) -> str:
    """Return the table of targets, with the sum of the launches that each takes."""
    card, body = CARDS["H200"], []
    for target in gpu_page.TARGETS:
        without = {"forward": "_bwd_", "backward": "_fwd_"}.get(target.direction, "no kernel")
        works = [
            calibration.work_of(row)
            for row in rows
            if (row["op"], row["config"], row["target"]) == (target.op, target.counted, card.target)
            and without not in row["kernel"]
        ]
        us = sum(prediction.microseconds(work, card, MODEL) for work in works)
        size = ", ".join(f"{key} {value}" for key, value in target.size.items() if value)
        launches, us = (str(len(works)), f"{us:,.0f}") if works else ("-", "-")
        body.append([target.op, size, target.direction, launches, f"{1e3 * target.ms:,.0f}", us])
    return f"{TARGETS}\n{tables.markdown(TARGET_HEADER, body)}"


def calibrated(measured: list[Measured]) -> list[str]:
    if not measured:
        return []
    left_out = calibration.held_out_error(measured, MODEL, id)
    text = CALIBRATION.format(
        error=calibration.median_error(measured, MODEL),
        num_calls=len(calibration.compared(measured)),
        held_out=median(left_out.values()),
        parameters=", ".join(prediction.parameters(MODEL)),
    )
    ops = tables.markdown(OPS_HEADER, op_cells(measured))
    return [f"{text}\n{ops}\n{tables.markdown(MEASURED_HEADER, map(measured_cells, measured))}"]


def op_cells(measured: list[Measured]) -> list[list[str]]:
    """Return a line for each op, with its error under a fit to the other ops."""
    held_out = calibration.held_out_error(measured, MODEL, attrgetter("op"))
    lines = []
    for op, without in held_out.items():
        calls = [call for call in calibration.compared(measured) if call.op == op]
        error = calibration.median_error(calls, MODEL)
        lines.append([op, str(len(calls)), f"{error:.0%}", f"{without:.0%}"])
    return lines


def measured_cells(call: Measured) -> list[str]:
    error = call.left_out or f"{call.error(MODEL):+.0%}"
    size = ", ".join(f"{key} {value}" for key, value in call.size.items())
    return [
        *(call.op, size, call.direction, call.tiles or "-"),
        *(f"{call.us:,.0f}", f"{call.predicted(MODEL):,.0f}", error),
    ]


def listed(counts: dict) -> str:
    """Write counts as ``2x16 1x4``: two of 16 bytes, one of 4; JSON has made the bytes text."""
    widest_first = sorted(counts.items(), key=lambda item: item[0].zfill(3), reverse=True)
    return " ".join(f"{n}x{what}" for what, n in widest_first) or "-"


def contract(row: dict) -> str:
    if not row["held"]:
        return "-"
    return "; ".join([*row["broken"], *excused(row["excused"])]) or "kept"


def excused(terms: Iterable[str]) -> list[str]:
    return [f"excused: {term.partition(':')[0]}" for term in terms]
