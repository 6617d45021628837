"""PREDICTED time of a GPU kernel, from its machine code, on a card that is not here.

The time of a launch is a fixed part and the longest of three: its bytes over the bandwidth, its
instructions over the issue rate, its tensor-core FLOPs over the GEMM rate. How often a loop runs is
not in the machine code: it follows from the FLOPs or bytes of the launch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from emu3_kernels.testing.chips import CHIPS, Chip
from emu3_kernels.testing.machine_code import Facts


@dataclass(frozen=True)
class Card:
    """What a card can do at most: MEASURED on the H200, elsewhere its data sheet times ours."""

    target: str
    gb_s: float
    tflop_s: float
    """Of bfloat16 GEMMs."""
    ghz: float

    @property
    def chip(self) -> Chip:
        return CHIPS[self.target]


SCHEDULERS = 4
"""Of an SM; each issues an instruction of a warp in a cycle."""

# The copy reaches 0.886 of 4,800 GB/s and the GEMM 0.82 of 989 TFLOP/s: the others likewise.
CARDS = {
    "H100": Card("sm_90", 0.886 * 3350, 811, 1.755),
    "H200": Card("sm_90", 4251, 811, 1.755),
    "A100": Card("sm_80", 0.886 * 2039, 0.82 * 312, 1.41),
    "MI300X": Card("gfx942", 0.886 * 5300, 0.82 * 1307, 2.1),
}


@dataclass(frozen=True)
class Work:
    """One launch: what is COUNTED of it."""

    facts: Facts
    programs: int
    num_warps: int
    num_bytes: int
    """Of all tensors, each once."""
    flops: int = 0
    """Of tensor cores, in the whole launch; 0 where they are not used or not known."""
    trips: int = 0
    """Iterations of a loop by one program; 0 to derive them from FLOPs or bytes."""


@dataclass(frozen=True)
class Model:
    """The fitted parameters."""

    launch_us: float
    """Of a launch without work."""
    issue: float
    """Instructions that one of the four schedulers of an SM issues in a cycle."""
    tensor: float
    """Share of the GEMM rate that HGMMA reach between other instructions."""
    in_flight: float
    """KiB that an SM must have in flight for the whole bandwidth."""


MODEL = Model(launch_us=12.4, issue=0.47, tensor=0.483, in_flight=121.0)
"""Fitted by ``calibration.fit`` to ``results/h200_counted.json``."""


def parameters(model: Model) -> list[str]:
    """Write each fitted parameter as ``launch_us 3``."""
    return [f"{name} {value:.3g}" for name, value in asdict(model).items()]


def instructions(work: Work, lanes: int) -> float:
    """Return how many instructions all warps of a launch execute."""
    outside, *loops = work.facts.blocks
    warps = work.programs * work.num_warps
    once = warps * outside.instructions
    return once + sum(trips * loop.instructions for trips, loop in _trips(work, lanes, loops))


def _trips(work: Work, lanes: int, loops: Sequence) -> list[tuple[float, object]]:
    """Return how often all warps together run each loop."""
    warps = work.programs * work.num_warps
    if work.trips:
        return [(warps * work.trips, loop) for loop in loops]
    if flops := sum(loop.flops for loop in loops):
        return [(work.flops / flops if loop.flops else 0, loop) for loop in loops]
    outside = work.facts.blocks[0]
    read = sum(loop.loads + loop.stores for loop in loops) * lanes
    left = work.num_bytes - warps * lanes * (outside.loads + outside.stores)
    trips = max(left / read, warps) if read else 0
    return [(trips if loop.loads + loop.stores else warps, loop) for loop in loops]


def is_known(work: Work) -> bool:
    """Whether the work of a launch is known: a kernel of tensor cores must state its FLOPs."""
    return bool(work.flops or work.trips or not work.facts.matrix_ops)


def resident(work: Work, card: Card) -> int:
    return card.chip.resident(work.facts, work.num_warps)


def waves(work: Work, card: Card) -> float:
    return work.programs / (resident(work, card) * card.chip.gpu.num_sms)


@dataclass(frozen=True)
class Cost:
    """What a launch takes on a card, before the model: microseconds at the highest rates."""

    issue: float
    tensor: float
    memory: float
    in_flight: float
    """KiB that the loads of a program keep in flight on an SM; 0 if it has none."""
    serialised: bool


def cost(work: Work, card: Card) -> Cost:
    sms, lanes = card.chip.gpu.num_sms, card.chip.gpu.warp_size
    full = waves(work, card)
    # SMs without a program, and the last wave.
    used = min(work.programs, sms) / sms * (full / ceil(full) if full > 1 else 1)
    together = min(work.programs / sms, resident(work, card))
    loads = max(block.loads for block in work.facts.blocks)
    return Cost(
        issue=instructions(work, lanes) / (SCHEDULERS * 1e3 * sms * card.ghz * used),
        tensor=work.flops / (1e6 * card.tflop_s * used),
        memory=work.num_bytes / (1e3 * card.gb_s),
        in_flight=together * work.num_warps * lanes * loads / 1024,
        serialised=work.facts.matrix_waits * 2 > sum(work.facts.matrix_ops.values()),
    )


def time_of(cost: Cost, model: Model) -> float:
    reached = min(1.0, cost.in_flight / model.in_flight) if cost.in_flight else 1.0
    parts = cost.issue / model.issue, cost.tensor / model.tensor, cost.memory / reached
    # Serialised matrix opcodes overlap with nothing.
    return model.launch_us + (sum(parts) if cost.serialised else max(parts))


def microseconds(work: Work, card: Card, model: Model) -> float:
    """Predict the time of one launch, without the host's."""
    return time_of(cost(work, card), model)
