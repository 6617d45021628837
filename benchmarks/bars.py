"""Ratios that the ops promise to reach, and what was measured of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.peers import COMPILED, COMPILED_OUT, EAGER, IN_PLACE


@dataclass(frozen=True)
class Bar:
    """``peer`` must take ``at_least`` times as long as ``op`` at sizes that hold ``size``."""

    op: str
    peer: str
    at_least: float
    size: tuple[tuple[str, object], ...]
    direction: str = "forward"
    threads: tuple[int, ...] = (1, 2)

    def covers(self, row: dict) -> bool:
        return (
            (self.op, self.direction) == (row["op"], row["direction"])
            and row["threads"] in self.threads
            and all(row["size"].get(name) == value for name, value in self.size)
            and self.peer in row["peers"]
        )


NORM = (("num_rows", 4096), ("width", 4096))
MLP = (("num_rows", 2048), ("width", 14336))
LOGITS = (("tokens", 256), ("classes", 184_622))

BARS = (
    Bar("rms_norm", "vLLM", 1.3, NORM),
    Bar("rms_norm", COMPILED_OUT, 1.3, NORM),
    Bar("rms_norm", COMPILED, 1.5, NORM, "backward"),
    Bar("add_rms_norm", "vLLM", 1.3, NORM),
    Bar("swiglu", COMPILED_OUT, 1.5, MLP),
    Bar("swiglu", EAGER, 4.0, MLP),
    Bar("swiglu", COMPILED, 1.5, MLP, "backward"),
    Bar("rope", "vLLM (in place)", 1.0, (("tokens", 2048),), IN_PLACE),
    Bar("cross_entropy", COMPILED, 2.0, LOGITS),
    Bar("cross_entropy", COMPILED, 2.0, LOGITS, "forward+backward"),
    Bar("linear_cross_entropy", EAGER, 2.0, (("tokens", 2048),), "forward+backward"),
    Bar("nearest_code", "faiss", 6.0, (("shape", [8, 4, 64, 64]),), threads=(1,)),
)


def verdicts(rows: Iterable[dict]) -> Iterator[tuple[Bar, dict | None]]:
    """Yield every bar with each row that it covers, or with None if no row does."""
    rows = list(rows)
    for bar in BARS:
        covered = sorted((row for row in rows if bar.covers(row)), key=lambda r: r["threads"])
        for row in covered or [None]:
            yield bar, row
