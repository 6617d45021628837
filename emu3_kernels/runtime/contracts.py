"""What the machine code of a GPU kernel is held to: data that stands beside the kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contract:
    """What the compiled code of a kernel keeps on every target; the code-generation gate counts.

    Every contract demands no stack, no spill, no more shared memory than the chip has, HGMMA that
    are not serialised and, on sm_90, a program or more for every SM. An access narrower than
    ``access_bytes`` is allowed only as one of the scalars.
    """

    max_registers: int
    """Of a thread: 65,536 over it is the number of threads that a multiprocessor holds."""
    access_bytes: int = 16
    scalar_loads: int = 0
    scalar_stores: int = 0
    tensor_cores: bool = False
    async_copies: bool = False
    few_programs: str = ""
    """Reason why a launch may leave SMs without a program."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Reason by ``"target: term"`` (``"gfx942: async_copies"``): there, that term is not held; by
    ``"target, triton 3.6: term"`` for one version alone.
    """


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
    targets: tuple[str, ...] = ()
    """Those that the kernels are for; none is all."""

    def is_for(self, target: str) -> bool:
        return not self.targets or target in self.targets


@dataclass(frozen=True)
class CudaKernel:
    """An instance of a CUDA C++ kernel, which nvcc compiles for every target."""

    header: str
    """Of ``csrc/cuda``, which defines it."""
    kernel: str
    """With its template arguments."""
    arguments: str
    """Types of its parameters, in parentheses."""
    contract: Contract


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make a tensor without memory, as aligned as an allocation: the argument of a Config."""
    return torch.empty(shape, dtype=dtype, device="meta")
