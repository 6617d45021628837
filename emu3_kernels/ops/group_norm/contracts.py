"""The compiled launches of the group norms, and what their machine code must keep."""

from functools import partial

import torch
from torch import Tensor

from emu3_kernels.ops.group_norm.triton import (
    group_norm,
    group_norm_backward,
    spatial_norm,
    spatial_norm_backward,
)
from emu3_kernels.runtime.contracts import Config, Contract, meta


def _group_norm(pixels: int, channels: int) -> None:
    group_norm(meta(1, pixels, channels), meta(channels), meta(channels), 32, 1e-6, True)


def _group_norm_backward(pixels: int, channels: int) -> None:
    stats = meta(1, 2, channels, dtype=torch.float32)
    x, weight = meta(1, pixels, channels), meta(channels)
    group_norm_backward(x, x, weight, weight, stats, None, 32, True)


def _parameters(channels: int) -> tuple[Tensor, ...]:
    vector, matrix = meta(channels), meta(channels, 4)
    return vector, vector, matrix, vector, matrix, vector


def _spatial_norm(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    spatial_norm(x, latent, *_parameters(channels), 32, 1e-6, True)


def _spatial_norm_backward(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    stats = meta(1, 2, channels, dtype=torch.float32)
    spatial_norm_backward(x, x, latent, *_parameters(channels), stats, None, 32, True)


# 128 registers keep 16 warps on a multiprocessor, each thread with 64 or 128 bytes in flight.
# Scalars are numbers by channel or by group, one a thread, of which a program loads and stores few.
STATISTICS = {"group_norm_moments_kernel": Contract(max_registers=128, scalar_stores=2)}
FEW = "a program for each 16 channels of sums"
NORM = Contract(max_registers=128, scalar_loads=8, scalar_stores=2)
GROUP_NORM = STATISTICS | {"group_norm_fwd_kernel": NORM}
GROUP_NORM_BACKWARD = {
    "group_norm_bwd_sums_kernel": Contract(max_registers=168, scalar_loads=4, scalar_stores=4),
    "group_norm_bwd_x_kernel": Contract(max_registers=128, scalar_loads=8),
    "group_norm_bwd_add_kernel": Contract(max_registers=64, scalar_stores=2, few_programs=FEW),
}
# Beside them, columns of both matrices, a number for each of a thread's channels, and the latent's
# numbers of each position: the same for all threads of a warp. Where a pixel has a position of its
# own, at 64 x 64, they are many.
SPATIAL_NORM = STATISTICS | {
    "group_norm_fwd_kernel": Contract(max_registers=255, scalar_loads=160, scalar_stores=2),
}
SPATIAL_NORM_BACKWARD = {
    "spatial_norm_silu_bwd_sums_kernel": Contract(
        max_registers=168, scalar_loads=80, scalar_stores=2
    ),
    "spatial_norm_silu_bwd_reduce_kernel": Contract(
        max_registers=168, scalar_loads=80, scalar_stores=4
    ),
    "spatial_norm_silu_bwd_latent_kernel": Contract(
        max_registers=128,
        scalar_loads=4,
        scalar_stores=1,
        exceptions={"gfx942: loads": "four numbers of a latent are 8 bytes"},
    ),
    "spatial_norm_silu_bwd_add_kernel": Contract(
        max_registers=64, scalar_loads=2, scalar_stores=4, few_programs=FEW
    ),
    "group_norm_bwd_x_kernel": Contract(max_registers=255, scalar_loads=100),
}

CONFIGS = {
    "group_norm_silu": tuple(
        Config(f"1 x {pixels} x {channels}{suffix}", partial(call, pixels, channels), contracts)
        for pixels, channels, forward in (
            (512 * 512, 256, GROUP_NORM),
            (64 * 64, 1024, GROUP_NORM),
        )
        for suffix, call, contracts in (
            ("", _group_norm, forward),
            (", backward", _group_norm_backward, GROUP_NORM_BACKWARD),
        )
    ),
    "spatial_norm_silu": tuple(
        Config(f"{side} x {side} x {channels}{suffix}", partial(call, side, channels), contracts)
        for side, channels in ((512, 256), (64, 1024))
        for suffix, call, contracts in (
            ("", _spatial_norm, SPATIAL_NORM),
            (", backward", _spatial_norm_backward, SPATIAL_NORM_BACKWARD),
        )
    ),
}
