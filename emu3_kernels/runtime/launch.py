"""What the Triton files of the ops share: where kernels run, tiles, contracts, row mathematics."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is decorated; so do we, once, at import."""

DEVICES = {"cuda", "cpu"} if INTERPRETED else {"cuda"}
"""Types of the devices whose tensors a launch takes; a ROCm device is of type cuda too."""

NUM_MULTIPROCESSORS = (
    torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 4
)
"""Programs that a persistent kernel launches; a small number stands in without a GPU."""

WARP = 64 if torch.version.hip else 32
"""Lanes of a warp, by which a tile may be chosen; ``benchmarks codegen`` sets its targets'."""


def why_not_triton(tensor: Tensor) -> str | None:
    """Say why a Triton kernel cannot run on ``tensor``; None if it can."""
    if tensor.device.type not in DEVICES:
        return f"Triton has no {tensor.device.type} target here"
    if tensor.dtype == torch.float64:
        return "float64 is left to the reference"
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16 (ttsem tests it instead)"
    return None


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(n)


@dataclass(frozen=True)
class Tile:
    """How many elements a program holds, and the warps that hold them."""

    block: int
    num_warps: int
    num_stages: int = 1

    def options(self) -> dict[str, int | bool]:
        """Return the keywords of a launch: FP fusion too, whose default Triton 3.10 flips."""
        return {
            "BLOCK": self.block,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class Contract:
    """What the compiled code of a kernel keeps on every target; ``benchmarks codegen`` counts.

    That there is no stack, no spill and no more shared memory than the chip has goes without
    saying. An access narrower than ``access_bytes`` is allowed only as one of the scalars.
    """

    max_registers: int
    """Of a thread: 65,536 over it is the number of threads that a multiprocessor holds."""
    access_bytes: int = 16
    scalar_loads: int = 0
    scalar_stores: int = 0
    tensor_cores: bool = False
    async_copies: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Reason by ``"target: fact"`` (``"gfx942: async_copies"``): there, that fact is not held."""


@dataclass(frozen=True)
class Config:
    """A call whose launches are compiled for every target and held to their contracts.

    ``call`` runs the op's own host code on :func:`meta` tensors, so that tiles, strides and
    alignment are those of a real launch and cannot drift from it.
    """

    name: str
    call: Callable[[], object]
    contracts: Mapping[str, Contract]
    """Contract by the name of the kernel: one for each that ``call`` launches."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make a tensor without memory, as aligned as an allocation: the argument of a Config."""
    return torch.empty(shape, dtype=dtype, device="meta")
