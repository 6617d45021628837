"""The GPUs that the code-generation gate compiles for: limits, and programs that run at once."""

from dataclasses import dataclass

from emu3_kernels.runtime.launch import Gpu
from emu3_kernels.testing.machine_code import Facts


@dataclass(frozen=True)
class Chip:
    """What a launch meets there."""

    gpu: Gpu
    """What host code chooses tiles and grids by."""
    shared_limit: int
    """Bytes of shared memory that one program may use."""
    shared_per_sm: int
    threads_per_sm: int
    registers_per_sm: int = 65536
    """Of 32 bits."""
    programs_per_sm: int = 32

    def resident(self, facts: Facts, num_warps: int) -> int:
        """Return how many programs of a launch one SM holds: the tightest of its limits."""
        threads = num_warps * self.gpu.warp_size
        # NVIDIA allocates 8 registers a thread at a time and keeps 1 KiB of each program's own.
        registers = -(-max(facts.registers, 1) // 8) * 8 * threads
        reserved = 1024 if self.gpu.warp_size == 32 else 0
        limits = [
            self.programs_per_sm,
            self.threads_per_sm // threads,
            self.registers_per_sm // registers,
        ]
        if facts.shared + reserved:
            limits.append(self.shared_per_sm // (facts.shared + reserved))
        return max(min(limits), 1)


CHIPS = {
    # A100
    "sm_80": Chip(Gpu(32, 108, 80), 163 << 10, 164 << 10, 2048),
    # H100 and H200
    "sm_90": Chip(Gpu(32, 132, 90), 227 << 10, 228 << 10, 2048),
    # B200
    "sm_100": Chip(Gpu(32, 148, 100), 227 << 10, 228 << 10, 2048),
    # MI300X: 4 SIMDs of 8 waves and 512 registers of each of 64 lanes
    "gfx942": Chip(Gpu(64, 304), 64 << 10, 64 << 10, 2048, 4 * 512 * 64),
}
"""Chip by target."""
