"""Targets of the ops: ratios to reach, and which rows reach them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.harness.bounds import EMPTY
from benchmarks.peers.cpu import COMPILED, COMPILED_OUT, EAGER, IN_PLACE
from benchmarks.report import tables

TIME, MEMORY, LOSS, BOUND, CALL = "time", "memory", "loss", "bound", "call"
TINY_MIB = 1e-3
"""In place of 0 MiB in a ratio."""


@dataclass(frozen=True)
class Target:
    """A ratio of ``peer`` to ``op`` to reach in all rows whose size has the values ``size``.

    - time: the peer takes at least ``value`` times as long.
    - memory: the peer holds at least ``value`` times as much beside the results.
    - loss: the two losses differ by at most the share ``value``.
    - bound: the op reaches at least the share ``value`` of the rate ``peer``.
    - call: the op takes at most ``value`` microseconds more than ``peer``.

    Without a ``dtype`` it applies to all.
    """

    op: str
    peer: str
    value: float
    size: tuple[object, ...]
    direction: str = "forward"
    threads: tuple[int, ...] = (1, 2)
    of: str = TIME
    dtype: str | None = None

    def applies(self, row: dict) -> bool:
        return (
            (self.op, self.direction) == (row["op"], row["direction"])
            and row.get("device", "cpu") == "cpu"
            and not row.get("suite")
            and row["threads"] in self.threads
            and self.dtype in (None, row["dtype"])
            and contains(row["size"], self.size)
            and (self.of in (BOUND, CALL) or self.peer in row["peers"])
            and (self.of != CALL or "above_empty_us" in row)
            and (self.of != LOSS or "after_steps" in row)
        )

    def measure(self, row: dict) -> float:
        if self.of == BOUND:
            return row["of_bound"]
        if self.of == CALL:
            return row["above_empty_us"]
        if self.of == LOSS:
            losses = row["after_steps"]["losses"]
            return abs(losses[row["backend"]] / losses[self.peer] - 1)
        peer = row["peers"][self.peer]
        if self.of == MEMORY:
            results = row.get("results_mib", 0)
            return (peer["peak_mib"] - results) / max(row["peak_mib"] - results, TINY_MIB)
        return peer["ratio"]["median"]

    def reached(self, row: dict) -> bool:
        value = self.measure(row)
        return value <= self.value if self.of in (LOSS, CALL) else value >= self.value

    def stated(self) -> str:
        if self.of == CALL:
            return f"at most {self.value:g} us more"
        return f"within {self.value:.1%}" if self.of == LOSS else f"{self.value}x"

    def measured(self, row: dict) -> str:
        if self.of == TIME:
            return tables.ratio(row["peers"][self.peer])
        if self.of == CALL:
            return f"{self.measure(row):.1f} us more"
        if self.of == LOSS:
            return f"{self.measure(row):.2%}"
        return f"{self.measure(row):.{2 if self.of == BOUND else 1}f}x"

    def limit(self, row: dict) -> str:
        """Say why no implementation can reach the target in ``row``; empty if one can."""
        bound = row.get("bound") or {}
        if self.of != TIME or not row.get("of_bound"):
            return ""
        highest = self.measure(row) / row["of_bound"]
        highest = bound.get("ceilings", {}).get(self.peer, highest)
        excluded = self.measure(row) <= highest < self.value
        return f"the bound allows {highest:.2f}x" if excluded else ""


def contains(size: dict, values: Iterable[object]) -> bool:
    left = list(size.values())
    for value in values:
        if value not in left:
            return False
        left.remove(value)
    return True


NORM = (4096, 4096)
MLP = (2048, 14336)
LOGITS = (256, 184_622)
HEAD = (2048, 184_622)
STEP, HALF_STEP = (2048, 2048), (2048, 1024)  # all tokens valid, half of them
TOKEN = (1, 4096)
IMAGE = ([1, 256, 512, 512],)
LONG = (1, 131_072)
FRAMES = [([1, channels, 32, 64, 64],) for channels in (4, 8, 16)]
BOTH, ROUND_TRIP, HF = "forward+backward", "encode+decode", "Hugging Face"

TARGETS = (
    Target("rms_norm", "vLLM", 1.3, NORM),
    Target("rms_norm", COMPILED_OUT, 1.3, NORM),
    Target("rms_norm", COMPILED, 1.5, NORM, "backward"),
    Target("rms_norm", EMPTY, 5.0, TOKEN, of=CALL),
    Target("add_rms_norm", "vLLM (in place)", 1.3, NORM),
    Target("add_rms_norm", "vLLM (in place)", 1.3, NORM, IN_PLACE),
    Target("swiglu", COMPILED_OUT, 1.5, MLP),
    Target("swiglu", EAGER, 4.0, MLP),
    Target("swiglu", COMPILED, 1.5, MLP, "backward"),
    Target("rope", "vLLM (in place)", 1.0, (2048,), IN_PLACE),
    Target("cross_entropy", COMPILED, 2.0, LOGITS),
    Target("cross_entropy", COMPILED, 2.0, LOGITS, BOTH),
    Target("linear_cross_entropy", EAGER, 2.0, HEAD, BOTH),
    Target("linear_cross_entropy", EAGER, 8.0, HEAD, BOTH, of=MEMORY),
    Target("attention", EAGER, 1.5, ()),
    Target("attention", "vLLM", 1.0, ()),
    Target("attention", EAGER, 1.2, (), "backward"),
    Target("decode_attention", EAGER, 4.0, LONG),
    Target("decode_attention", "vLLM", 1.0, LONG),
    Target("decode_attention", "read bandwidth", 0.75, LONG, of=BOUND),
    Target("group_norm_silu", EAGER, 2.0, IMAGE),
    Target("group_norm_silu", COMPILED, 1.3, IMAGE),
    Target("spatial_norm_silu", EAGER, 2.0, IMAGE),
    Target("spatial_norm_silu", COMPILED, 1.3, IMAGE),
    *(Target("temporal_residual", EAGER, 15.0, size, threads=(2,)) for size in FRAMES),
    *(Target("temporal_residual", EAGER, 8.0, size, BOTH, threads=(2,)) for size in FRAMES),
    Target("conv3x3", EAGER, 1.3, ()),
    Target("nearest_code", "faiss", 20.0, ([8, 4, 64, 64],), threads=(1,)),
    Target("model", HF, 2.5, STEP, BOTH),
    Target("model", HF, 4.0, HALF_STEP, BOTH),
    Target("model", HF, 4.0, STEP, BOTH, of=MEMORY),
    Target("model", HF, 0.005, STEP, BOTH, of=LOSS),
    Target("train", f"{HF}, padded", 3.0, (), "training step"),
    Target("generate", HF, 6.0, (), "generate"),
    Target("vision", HF, 3.0, (), ROUND_TRIP, dtype="float32"),
    Target("vision", HF, 6.0, (), ROUND_TRIP, dtype="bfloat16"),
    Target("vision", HF, 2.0, (), ROUND_TRIP, of=MEMORY),
)


def verdicts(rows: Iterable[dict]) -> Iterator[tuple[Target, dict | None]]:
    """Yield every target with each row to which it applies, or with None if there is no row."""
    rows = list(rows)
    for target in TARGETS:
        found = sorted((row for row in rows if target.applies(row)), key=lambda r: r["threads"])
        for row in found or [None]:
            yield target, row
