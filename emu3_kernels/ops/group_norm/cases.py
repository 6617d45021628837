"""Sizes of the group norms that the tests check and the benchmarks time."""

from math import prod

import torch

from emu3_kernels.runtime.cases import Cases


def make_group_norm_silu(
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


def make_spatial_norm_silu(
    *,
    shape: list[int],
    latent: list[int],
    groups: int,
    width: int = 4,
    offset: float = 0.0,
    dtype: torch.dtype,
    device: str,
    **settings: object,
) -> dict[str, object]:
    """In channels-last memory; ``offset`` is the mean of x, ``width`` the latent's channels."""
    random = torch.Generator(device).manual_seed(0)
    batch, channels, *pixels = shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, device=device)

    latents = [1] * (len(pixels) - len(latent)) + latent
    return {
        "x": (offset + 3 * draw(batch, *pixels, channels)).to(dtype).movedim(-1, 1),
        "latent": draw(batch, width, *latents).to(dtype),
        "weight": (1 + draw(channels)).to(dtype),
        "bias": draw(channels).to(dtype),
        "y_weight": (draw(channels, width) / 2).to(dtype),
        "y_bias": (1 + draw(channels)).to(dtype),
        "b_weight": (draw(channels, width) / 2).to(dtype),
        "b_bias": draw(channels).to(dtype),
        "groups": groups,
        **settings,
    }


def bytes_moved(*, shape: list[int], dtype: torch.dtype, **settings: object) -> int:
    """Forward traffic of an image that no cache holds: two reads and a write."""
    return 3 * prod(shape) * dtype.itemsize


def backward_bytes(*, shape: list[int], dtype: torch.dtype, **settings: object) -> int:
    """Of a backward pass: dout and x are read twice, dx is written."""
    return 5 * prod(shape) * dtype.itemsize


CASES = {
    "group_norm_silu": Cases(
        make=make_group_norm_silu,
        check=[
            {"shape": [0, 8, 4, 4], "groups": 4},
            {"shape": [2, 8, 0, 4], "groups": 4},
            {"shape": [1, 96, 1, 1], "groups": 3},  # one pixel
            {"shape": [2, 32, 5, 7], "groups": 32},  # one channel a group
            {"shape": [2, 42, 9, 5], "groups": 3},  # channels and groups that fill no vector
            # Several chunks of every kernel.
            {"shape": [1, 128, 30, 40], "groups": 32, "silu": False},
            {"shape": [1, 16, 4, 5, 6], "groups": 8, "eps": 0.5},  # a video
            # E[x^2] - E[x]^2 would cancel.
            {"shape": [2, 64, 11, 13], "groups": 8, "offset": 300.0},
        ],
        time=[
            {"shape": [1, 256, 512, 512], "groups": 32},  # the widest activation of the decoder
            {"shape": [1, 1024, 64, 64], "groups": 32},  # and the deepest
        ],
        bytes_moved=bytes_moved,
        backward_bytes=backward_bytes,
    ),
    "spatial_norm_silu": Cases(
        make=make_spatial_norm_silu,
        check=[
            {"shape": [0, 8, 4, 4], "latent": [2, 2], "groups": 4},
            {"shape": [2, 8, 0, 4], "latent": [1, 2], "groups": 4},
            {"shape": [3, 96, 1, 1], "latent": [1, 1], "groups": 3, "width": 1},  # one pixel
            {"shape": [2, 32, 6, 8], "latent": [3, 4], "groups": 32},  # one channel a group
            {"shape": [2, 42, 9, 5], "latent": [4, 3], "groups": 3},  # ratios that are no integers
            # Emu3's ratio.
            {"shape": [1, 128, 32, 40], "latent": [4, 5], "groups": 32, "silu": False},
            # A pixel a position of the latent.
            {"shape": [2, 64, 5, 7], "latent": [5, 7], "groups": 8, "offset": 300.0},
            # Positions of no pixel.
            {"shape": [1, 16, 3, 2, 7], "latent": [9, 11], "groups": 8, "width": 5},
            {"shape": [1, 16, 5, 4, 6], "latent": [2, 2, 3], "groups": 8, "eps": 0.5},  # a video
        ],
        time=[
            # The end of Emu3's decoder, and its start.
            {"shape": [1, 256, 512, 512], "latent": [64, 64], "groups": 32},
            {"shape": [1, 1024, 64, 64], "latent": [64, 64], "groups": 32},
        ],
        bytes_moved=bytes_moved,
        backward_bytes=backward_bytes,
    ),
}
