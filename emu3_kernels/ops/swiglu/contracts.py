"""What the compiled Triton kernels of swiglu are held to."""

from emu3_kernels.ops.swiglu.triton import backward, forward
from emu3_kernels.runtime.contracts import Config, Contract, meta

# 64 registers keep 32 warps on a multiprocessor of 65,536: half of what it can hold.
CONFIGS = {
    "swiglu": (
        Config(
            "2048 x 14336, packed",
            lambda: forward(*meta(2048, 2 * 14336).chunk(2, dim=-1)),
            {"swiglu_fwd_kernel": Contract(max_registers=64)},
        ),
        Config(
            "1 x 14336, one decoded token",
            lambda: forward(meta(1, 14336), meta(1, 14336)),
            {"swiglu_fwd_kernel": Contract(max_registers=64, few_programs="one row of 28 KiB")},
        ),
        Config(
            "2048 x 14336, packed",
            lambda: backward(meta(2048, 14336), *meta(2048, 2 * 14336).chunk(2, dim=-1)),
            {"swiglu_bwd_kernel": Contract(max_registers=64)},
        ),
    )
}
