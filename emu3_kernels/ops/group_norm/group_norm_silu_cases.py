"""Sizes of group_norm_silu that the tests check and the benchmarks time."""

from math import prod

import torch

CHECK = [
    {"shape": [0, 8, 4, 4], "groups": 4},
    {"shape": [2, 8, 0, 4], "groups": 4},
    {"shape": [1, 96, 1, 1], "groups": 3},  # one pixel
    {"shape": [2, 32, 5, 7], "groups": 32},  # one channel a group
    {"shape": [2, 42, 9, 5], "groups": 3},  # channels and groups that fill no vector
    {"shape": [1, 128, 30, 40], "groups": 32, "silu": False},  # several chunks of every kernel
    {"shape": [1, 16, 4, 5, 6], "groups": 8, "eps": 0.5},  # a video
    {"shape": [2, 64, 11, 13], "groups": 8, "offset": 300.0},  # E[x^2] - E[x]^2 would cancel
]
TIME = [
    {"shape": [1, 256, 512, 512], "groups": 32},  # the widest activation of Emu3's decoder
    {"shape": [1, 1024, 64, 64], "groups": 32},  # and the deepest
]


def make(
    *,
    shape: list[int],
    groups: int,
    offset: float = 0.0,
    dtype: torch.dtype,
    device: str,
    **settings: object,
) -> dict[str, object]:
    """In channels-last memory; ``offset`` is the mean of x."""
    random = torch.Generator(device).manual_seed(0)
    batch, channels, *pixels = shape
    x = offset + 3 * torch.randn(batch, *pixels, channels, generator=random, device=device)
    weight, bias = torch.randn(2, channels, generator=random, device=device).to(dtype)
    return {
        "x": x.to(dtype).movedim(-1, 1),
        "weight": 1 + weight,
        "bias": bias,
        "groups": groups,
        **settings,
    }


def bytes_moved(*, shape: list[int], groups: int, dtype: torch.dtype) -> int:
    """Forward traffic of an image that no cache holds: two reads and a write."""
    return 3 * prod(shape) * dtype.itemsize


def backward_bytes(*, shape: list[int], groups: int, dtype: torch.dtype) -> int:
    """Of a backward pass: dout and x are read twice, dx is written."""
    return 5 * prod(shape) * dtype.itemsize
