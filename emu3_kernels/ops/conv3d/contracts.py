"""The configurations of the convolutions in Triton, and what their machine code is held to."""

from dataclasses import replace
from functools import partial

import torch

from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.ops.conv3d.triton_backward import backward
from emu3_kernels.ops.conv3d.triton_forward import forward
from emu3_kernels.runtime.launch import Config, Contract, meta

BLOCK = (3, 3, 3), Plan(silu=True)
HALVING = (4, 3, 3), Plan((2, 1, 1), post_silu=True)
EIGHTH = (3, 3, 3), Plan((2, 2, 2), silu=True, post_silu=True)


def _call(
    kernel: tuple[int, int, int],
    plan: Plan,
    *,
    channels: int,
    dtype: torch.dtype = torch.bfloat16,
    backwards: bool = False,
) -> None:
    """32 frames of 64 x 64 with a norm, a bias and a residual."""
    x, vector = meta(1, channels, 32, 64, 64, dtype=dtype), meta(channels, dtype=dtype)
    weight = meta(channels, channels, *kernel, dtype=dtype)
    y = meta(*out_shape(x, weight, plan), dtype=dtype)
    if backwards:
        backward(y, x, weight, vector, vector, vector, plan)
    else:
        forward(x, weight, vector, vector, vector, y, plan)


# Of 65,536 registers, 255 a thread leave room for one program of 256 threads or two of 128.
COPIES = {"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"}
APART = {"gfx942: stores": "v_mfma leaves a thread channels of a pixel, which lie apart in y"}
BESIDE = {"gfx942: stores": "v_mfma leaves a thread four channels side by side: 8 bytes"}
PRODUCT = Contract(max_registers=255, tensor_cores=True, async_copies=True, exceptions=COPIES)
# Narrow are vectors of channels, and the sums for dscale and dshift.
OPERAND = Contract(max_registers=64, scalar_loads=16)
SUM = Contract(max_registers=96, scalar_stores=1)
TO_VIDEO = replace(PRODUCT, scalar_loads=24, scalar_stores=2)
WIDE = {"_operand_kernel": OPERAND, "_fwd_kernel": replace(TO_VIDEO, exceptions=COPIES | APART)}
WIDE_BACKWARD = {
    "_operand_kernel": OPERAND,
    "_bwd_x_kernel": TO_VIDEO,
    "_bwd_weight_kernel": PRODUCT,
    "_sum_kernel": SUM,
}
STRIDED_BACKWARD = WIDE_BACKWARD | {
    "_bwd_z_kernel": replace(TO_VIDEO, exceptions=COPIES | BESIDE),
    # A thread has 16 pixels, and every second column is of another phase.
    "_bwd_x_kernel": replace(TO_VIDEO, scalar_loads=40, scalar_stores=18),
}
# Four channels of bfloat16, side by side in the operand, are 8 bytes.
NARROW = {name: replace(contract, access_bytes=8) for name, contract in WIDE.items()}
NARROW_BACKWARD = {
    name: replace(contract, access_bytes=8) for name, contract in WIDE_BACKWARD.items()
}
HALVING_BACKWARD = NARROW_BACKWARD | {
    "_bwd_z_kernel": replace(TO_VIDEO, access_bytes=8),
    "_bwd_x_kernel": replace(TO_VIDEO, access_bytes=8, exceptions=COPIES | APART),
}
# TF32 would round: float32 is multiplied without tensor cores, but for those of gfx942.
EXACT = {name: replace(contract, tensor_cores=False) for name, contract in WIDE.items()}
EXACT_BACKWARD = {
    name: replace(contract, tensor_cores=False) for name, contract in WIDE_BACKWARD.items()
}


def _configs(
    name: str,
    forwards: dict[str, Contract],
    backwards: dict[str, Contract],
    *call: object,
    **settings: object,
) -> tuple[Config, Config]:
    return (
        Config(name, partial(_call, *call, **settings), forwards),
        Config(name, partial(_call, *call, **settings, backwards=True), backwards),
    )


CONFIGS = (
    *_configs("512 channels", WIDE, WIDE_BACKWARD, *BLOCK, channels=512),
    _configs("512, an eighth", WIDE, STRIDED_BACKWARD, *EIGHTH, channels=512)[1],
    *_configs("4, Emu3's block", NARROW, NARROW_BACKWARD, *BLOCK, channels=4),
    *_configs("4, Emu3's halving", NARROW, HALVING_BACKWARD, *HALVING, channels=4),
    *_configs("512, float32", EXACT, EXACT_BACKWARD, *BLOCK, channels=512, dtype=torch.float32),
)
