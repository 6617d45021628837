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
    by_channel = (meta(1, channels, dtype=torch.float32) for _ in range(2))
    x, weight = meta(1, pixels, channels), meta(channels)
    group_norm_backward(x, x, weight, weight, *by_channel, 32, True)


def _parameters(channels: int) -> tuple[Tensor, ...]:
    vector, matrix = meta(channels), meta(channels, 4)
    return vector, vector, matrix, vector, matrix, vector


def _spatial_norm(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    spatial_norm(x, latent, *_parameters(channels), 32, 1e-6, True)


def _spatial_norm_backward(side: int, channels: int) -> None:
    x, latent = meta(1, 1, side, side, channels), meta(1, 1, 64, 64, 4)
    by_channel = (meta(1, channels, dtype=torch.float32) for _ in range(2))
    spatial_norm_backward(x, x, latent, *_parameters(channels), *by_channel, 32, True)


# 128 registers keep 16 warps on a multiprocessor. A thread stores one sum and loads one number of a
# channel, little beside the pixels. Rows of 4 to 32 channels, a group, allow no wide access.
GROUPS = "a program for each of 32 groups, of sums that are computed before"
STATISTICS = {
    "group_norm_moments_kernel": Contract(max_registers=128, scalar_stores=2),
    "group_norm_stats_kernel": Contract(max_registers=128, access_bytes=4, few_programs=GROUPS),
}
GROUP_BACKWARD = {
    "group_norm_bwd_group_kernel": Contract(max_registers=128, access_bytes=2, few_programs=GROUPS)
}

# The scalars are the numbers of the channels, one a thread in a tile of 128 channels.
GROUP_NORM = STATISTICS | {
    "group_norm_fwd_kernel": Contract(max_registers=64, scalar_loads=4),
}
GROUP_NORM_BACKWARD = GROUP_BACKWARD | {
    "group_norm_bwd_sums_kernel": Contract(max_registers=128, scalar_loads=4, scalar_stores=2),
    "group_norm_bwd_x_kernel": Contract(max_registers=128, scalar_loads=6),
}

# Beside the numbers of the channels, the four of the latent for each of the 16 pixels of a tile: 64
# scalars, the same for all threads of a warp. 168 registers keep 12 warps.
SPATIAL_NORM = STATISTICS | {
    "group_norm_fwd_kernel": Contract(max_registers=128, scalar_loads=78),
}
SPATIAL_NORM_BACKWARD = GROUP_BACKWARD | {
    "spatial_norm_silu_bwd_sums_kernel": Contract(
        max_registers=168, scalar_loads=18, scalar_stores=2
    ),
    "spatial_norm_silu_bwd_reduce_kernel": Contract(
        max_registers=128,
        scalar_loads=69,
        scalar_stores=2,
        few_programs="a program for each of 64 rows of the latent and 128 channels",
    ),
    "spatial_norm_silu_bwd_latent_kernel": Contract(
        max_registers=128, scalar_loads=4, scalar_stores=1
    ),
    "group_norm_bwd_x_kernel": Contract(max_registers=168, scalar_loads=80),
}

CONFIGS = {
    "group_norm_silu": tuple(
        Config(f"1 x {pixels} x {channels}{suffix}", partial(call, pixels, channels), contracts)
        for pixels, channels in ((512 * 512, 256), (64 * 64, 1024))
        for suffix, call, contracts in (
            ("", _group_norm, GROUP_NORM),
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
