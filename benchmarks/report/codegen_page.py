"""The machine code of the GPU kernels as Markdown: ours beside Liger's, a table for each op."""

from collections.abc import Iterable

from benchmarks.report import tables

HEADER = (
    *("kernel", "config", "target", "registers", "stack", "spills", "shared"),
    *("loads", "stores", "matrix opcodes", "async copies", "bytes", "contract"),
)

INTRODUCTION = """# Machine code

Everything here is COUNTED, without a GPU, by `python -m benchmarks codegen --peers` with
Triton {triton}: every kernel is compiled for every target, ours as `CONFIGS` launches it,
Liger-Kernel's as its own host code does. `loads` and `stores` are the accesses of global memory in
the code, count x bytes a thread; `bytes` is the size of all tensor arguments of the launch, each
counted once. Ours are checked against a contract in `contracts.py`, which gives the reason of each
excused term.
"""


def page(counted: dict) -> str:
    rows = counted["rows"]
    ops = dict.fromkeys(row["op"] for row in rows)
    sections = [
        f"## {op}\n\n{tables.markdown(HEADER, [cells(row) for row in rows if row['op'] == op])}"
        for op in ops
    ]
    return "\n".join([INTRODUCTION.format(triton=counted["triton"]), *sections])


def cells(row: dict) -> list[str]:
    facts = row["facts"]
    name = f"`{row['kernel']}`" if not row["held"] else f"**`{row['kernel']}`**"
    return [
        *(name, row["config"], row["target"]),
        *(str(facts[term]) for term in ("registers", "stack", "spills", "shared")),
        *(listed(facts[term]) for term in ("loads", "stores", "matrix_ops")),
        *(str(facts["async_copies"]), f"{row['num_bytes']:,}", contract(row)),
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
