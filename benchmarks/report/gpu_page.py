"""What the page of a GPU has beside the tables: kernel and host time, kernels, what failed."""

from typing import NamedTuple

from benchmarks.harness.results import NOT_TIMED
from benchmarks.report import tables

DRY = "**DRY RUN**: tiny sizes on a CPU, to test the command. These numbers say nothing.\n"
APART = (
    "MEASURED. `events`: the flushed call between two CUDA events, its host time included where "
    "that is longer. `CUDA graph`: the same kernels without host time. `host`: Python and driver "
    "until the call returns, on an idle GPU.\n"
)
APART_HEADER = (
    "op",
    "size",
    "dtype",
    "direction",
    "entry",
    "events ms",
    "CUDA graph ms",
    "host us",
)
KERNEL_HEADER = ("kernel", "launches", "MEASURED ms", "share")
LONGEST_NAME = 90


def dry(rows: list[dict]) -> list[str]:
    return [DRY] if any(row["label"] == "DRY RUN" for row in rows) else []


def not_timed(rows: list[dict]) -> list[str]:
    """Return the table of what failed and of what was left out."""
    missing = [row for row in rows if row.get("suite") == NOT_TIMED]
    if not missing:
        return []
    body = [
        [row["op"], tables.size(row), row["dtype"], row["direction"], row["why"].replace("|", "/")]
        for row in missing
    ]
    header = ("op", "size", "dtype", "direction", "why")
    return ["## Not timed\n", tables.markdown(header, body)]


def apart(rows: list[dict]) -> list[str]:
    """Return the table of kernel and host times."""
    body = [line for row in rows for line in _apart_lines(row)]
    return ["## Kernel time and host time\n", APART, tables.markdown(APART_HEADER, body)] * bool(
        body
    )


def _apart_lines(row: dict) -> list[list[str]]:
    case = [row["op"], tables.size(row), row["dtype"], row["direction"]]
    entries = {f"**{row['backend']}**": row, **row["peers"]}
    return [
        [*case, name, *(number(one.get(key)) for key in ("ms", "graph_ms", "host_us"))]
        for name, one in entries.items()
        if "host_us" in one
    ]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def kernels(rows: list[dict]) -> list[str]:
    """Return a table of the kernels of each row that has one."""
    parts = []
    for row in rows:
        if found := row.get("kernels"):
            total = sum(kernel["ms"] for kernel in found)
            parts += [
                f"## Kernels of {row['op']}, {tables.size(row)}, {row['dtype']}, "
                f"{row['direction']}\n",
                f"{row['backend']}: {sum(kernel['launches'] for kernel in found):,} launches, "
                f"{total:.3g} ms.\n",
                tables.markdown(KERNEL_HEADER, [_kernel_line(kernel, total) for kernel in found]),
            ]
    return parts


def _kernel_line(kernel: dict, total: float) -> list[str]:
    name = kernel["kernel"].replace("|", "/")
    name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
    share = kernel["ms"] / total
    return [f"`{name}`", str(kernel["launches"]), f"{kernel['ms']:.3f}", f"{share:.1%}"]


WHOLE = "16384, 32:8 heads of 128"
"""A config of attention: one document."""


class Target(NamedTuple):
    """Of an H200."""

    op: str
    size: dict[str, object]
    """Values of its size."""
    direction: str
    ms: float
    counted: str | None = None
    """The config of our kernels at that size; None where others' kernels take the time."""


TARGETS = (
    Target("linear_cross_entropy", {"tokens": 8192, "dropped": 0.0}, "forward+backward", 52.0),
    Target("cross_entropy", {"tokens": 4096}, "forward", 0.45, "4096 x 184622"),
    Target("cross_entropy", {"tokens": 4096}, "forward+backward", 1.4, "4096 x 184622"),
    # 580 and 530 TFLOP/s over the keys that a causal mask leaves.
    Target("attention", {"queries": 16_384, "documents": None}, "forward", 3.8, WHOLE),
    Target("attention", {"queries": 16_384, "documents": None}, "backward", 10.4, WHOLE),
    Target("decode_attention", {"batch": 1, "capacity": 131_072}, "forward", 0.136, "131072 keys"),
    Target(
        "decode_attention", {"batch": 2, "new": 1, "capacity": 8192}, "forward", 0.030, "one token"
    ),
    Target("temporal_residual", {"shape": [1, 4, 32, 64, 64]}, "forward", 0.030, "4 channels"),
    Target("group_norm_silu", {"shape": [1, 256, 512, 512]}, "forward", 0.13, "1 x 262144 x 256"),
    Target("model", {"layers": 8, "tokens": 8192}, "forward+backward", 205.0),
    Target("decode step", {"batch": 2, "context": 4096}, "forward", 4.6),
    Target("vision", {"height": 512, "frames": None}, "decode", 12.0),
)


def targets(rows: list[dict]) -> list[str]:
    """Return the table of targets that have a row; the time is that in a CUDA graph if known."""
    rows, body = [row for row in rows if row.get("device", "cpu") != "cpu"], []
    for target in TARGETS:
        for row in rows:
            wanted = target.op, target.direction, "MEASURED"
            same = (row["op"], row["direction"], row["label"]) == wanted
            if same and all(row["size"].get(k) == v for k, v in target.size.items()):
                best = row.get("graph_ms", row["ms"])
                verdict = "reached" if best <= target.ms else f"**{best / target.ms:.2f}x of it**"
                case = [row["op"], tables.size(row), row["dtype"], row["direction"], row["backend"]]
                body.append([*case, f"{target.ms:g}", number(best), verdict])
    header = ("op", "size", "dtype", "direction", "backend", "target ms", "MEASURED ms", "")
    text = "Targets of an H200; kernels alone, in a CUDA graph, where they can be captured.\n"
    return ["## Targets\n", text, tables.markdown(header, body)] * bool(body)
