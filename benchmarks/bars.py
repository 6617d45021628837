"""Ratios that the ops promise to reach, and what was measured of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.bounds import EMPTY
from benchmarks.peers import COMPILED, COMPILED_OUT, EAGER, IN_PLACE
from benchmarks.tables import ratio

TIME, MEMORY, LOSS, BOUND, CALL = "time", "memory", "loss", "bound", "call"
A_LITTLE = 1e-3
"""MiB that stand for none."""


@dataclass(frozen=True)
class Bar:
    """``peer`` must take ``at_least`` times as long as ``op`` at sizes that hold ``size``.

    Of memory it must hold so many times as much beside the results; of a loss, ``at_least`` is the
    share by which the two may differ at most; of a bound, the rate that ``op`` must reach as a
    share of ``peer``, the rate of the machine; of a call, the microseconds that ``op`` may take
    more than ``peer`` at most. Without a ``dtype`` it holds for all.
    """

    op: str
    peer: str
    at_least: float
    size: tuple[tuple[str, object], ...]
    direction: str = "forward"
    threads: tuple[int, ...] = (1, 2)
    of: str = TIME
    dtype: str | None = None

    def covers(self, row: dict) -> bool:
        return (
            (self.op, self.direction) == (row["op"], row["direction"])
            and row.get("device", "cpu") == "cpu"
            and row["threads"] in self.threads
            and self.dtype in (None, row["dtype"])
            and all(row["size"].get(name) == value for name, value in self.size)
            and (self.of in (BOUND, CALL) or self.peer in row["peers"])
            and (self.of != CALL or "above_empty_us" in row)
            and (self.of != LOSS or "after_steps" in row)
        )

    def value(self, row: dict) -> float:
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
            return (peer["peak_mib"] - results) / max(row["peak_mib"] - results, A_LITTLE)
        return peer["ratio"]["median"]

    def kept(self, row: dict) -> bool:
        value = self.value(row)
        return value <= self.at_least if self.of in (LOSS, CALL) else value >= self.at_least

    def asked(self) -> str:
        if self.of == CALL:
            return f"within {self.at_least:g} us"
        return f"within {self.at_least:.1%}" if self.of == LOSS else f"{self.at_least}x"

    def measured(self, row: dict) -> str:
        if self.of == TIME:
            return ratio(row["peers"][self.peer])
        if self.of == BOUND:
            return f"{self.value(row):.2f}x"
        if self.of == CALL:
            return f"{self.value(row):.1f} us more"
        return f"{self.value(row):.2%}" if self.of == LOSS else f"{self.value(row):.1f}x"


NORM = (("num_rows", 4096), ("width", 4096))
MLP = (("num_rows", 2048), ("width", 14336))
LOGITS = (("tokens", 256), ("classes", 184_622))
HEAD = (("tokens", 2048), ("classes", 184_622))
STEP, HALF_STEP = (("tokens", 2048), ("counted", 2048)), (("tokens", 2048), ("counted", 1024))
TOKEN = (("num_rows", 1), ("width", 4096))
PICTURE = (("shape", [1, 256, 512, 512]),)
LONG = (("batch", 1), ("capacity", 131_072))
FRAMES = [(("shape", [1, channels, 32, 64, 64]),) for channels in (4, 8, 16)]
BOTH, REDRAW, HF = "forward+backward", "encode+decode", "Hugging Face"

BARS = (
    Bar("rms_norm", "vLLM", 1.3, NORM),
    Bar("rms_norm", COMPILED_OUT, 1.3, NORM),
    Bar("rms_norm", COMPILED, 1.5, NORM, "backward"),
    Bar("rms_norm", EMPTY, 5.0, TOKEN, of=CALL),
    Bar("add_rms_norm", "vLLM (in place)", 1.3, NORM),
    Bar("add_rms_norm", "vLLM (in place)", 1.3, NORM, IN_PLACE),
    Bar("swiglu", COMPILED_OUT, 1.5, MLP),
    Bar("swiglu", EAGER, 4.0, MLP),
    Bar("swiglu", COMPILED, 1.5, MLP, "backward"),
    Bar("rope", "vLLM (in place)", 1.0, (("tokens", 2048),), IN_PLACE),
    Bar("cross_entropy", COMPILED, 2.0, LOGITS),
    Bar("cross_entropy", COMPILED, 2.0, LOGITS, BOTH),
    Bar("linear_cross_entropy", EAGER, 2.0, HEAD, BOTH),
    Bar("linear_cross_entropy", EAGER, 8.0, HEAD, BOTH, of=MEMORY),
    Bar("attention", EAGER, 1.5, ()),
    Bar("attention", "vLLM", 1.0, ()),
    Bar("attention", EAGER, 1.2, (), "backward"),
    Bar("decode_attention", EAGER, 4.0, LONG),
    Bar("decode_attention", "vLLM", 1.0, LONG),
    Bar("decode_attention", "read bandwidth", 0.75, LONG, of=BOUND),
    Bar("group_norm_silu", EAGER, 2.0, PICTURE),
    Bar("group_norm_silu", COMPILED, 1.3, PICTURE),
    Bar("spatial_norm_silu", EAGER, 2.0, PICTURE),
    Bar("spatial_norm_silu", COMPILED, 1.3, PICTURE),
    *(Bar("temporal_residual", EAGER, 15.0, size, threads=(2,)) for size in FRAMES),
    *(Bar("temporal_residual", EAGER, 8.0, size, BOTH, threads=(2,)) for size in FRAMES),
    Bar("conv3x3", EAGER, 1.3, ()),
    Bar("nearest_code", "faiss", 20.0, (("shape", [8, 4, 64, 64]),), threads=(1,)),
    Bar("model", HF, 2.5, STEP, BOTH),
    Bar("model", HF, 4.0, HALF_STEP, BOTH),
    Bar("model", HF, 4.0, STEP, BOTH, of=MEMORY),
    Bar("model", HF, 0.005, STEP, BOTH, of=LOSS),
    Bar("vision", HF, 3.0, (), REDRAW, dtype="float32"),
    Bar("vision", HF, 6.0, (), REDRAW, dtype="bfloat16"),
    Bar("vision", HF, 2.0, (), REDRAW, of=MEMORY),
)


def verdicts(rows: Iterable[dict]) -> Iterator[tuple[Bar, dict | None]]:
    """Yield every bar with each row that it covers, or with None if no row does."""
    rows = list(rows)
    for bar in BARS:
        covered = sorted((row for row in rows if bar.covers(row)), key=lambda r: r["threads"])
        for row in covered or [None]:
            yield bar, row
