"""Sizes of the causal convolutions that the tests check and the benchmarks time."""

from math import prod

import torch
from torch import Tensor

from emu3_kernels.runtime.cases import Cases

BLOCK = {"kernel": [3, 3, 3], "norm": True, "activation": "silu", "residual": True}
DOWN = {"kernel": [4, 3, 3], "stride": [2, 1, 1], "post_activation": "silu"}


def make_causal_conv3d(
    *,
    shape: list[int],
    out: int,
    kernel: list[int],
    stride: tuple[int, int, int] = (1, 1, 1),
    bias: bool = True,
    norm: bool = False,
    activation: str | None = None,
    post_activation: str | None = None,
    residual: bool = False,
    dtype: torch.dtype,
    device: str,
) -> dict[str, object]:
    """Draw weights of variance 1 / K of the GEMM, so that outputs are about one."""
    random = torch.Generator(device).manual_seed(0)
    channels, sizes = shape[1], shape[2:]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    x = 1.5 * draw(*shape)
    weight = draw(out, channels, *kernel) / (channels * prod(kernel)) ** 0.5
    result = (shape[0], out, *(size // step for size, step in zip(sizes, stride, strict=True)))
    return {
        "x": x.to(dtype),
        "weight": weight.to(dtype),
        "bias": draw(out).to(dtype) if bias else None,
        "stride": tuple(stride),
        "scale": (1 + 0.3 * draw(channels)).to(dtype) if norm else None,
        "shift": draw(channels).to(dtype) if norm else None,
        "activation": activation,
        "post_activation": post_activation,
        "residual": draw(*result).to(dtype) if residual else None,
    }


def conv_flops(
    *,
    shape: list[int],
    out: int,
    kernel: list[int],
    stride: tuple[int, int, int] = (1, 1, 1),
    dtype: torch.dtype,
    **settings: object,
) -> int:
    """Of the convolution alone, multiplications by the zeros of its padding included."""
    results = shape[0] * out * prod(s // step for s, step in zip(shape[2:], stride, strict=True))
    return 2 * results * shape[1] * prod(kernel)


def make_temporal_residual(
    *, shape: list[int], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Draw hidden values and results of about one, and norms as training leaves them."""
    random = torch.Generator(device).manual_seed(0)
    channels = shape[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    inputs = {"x": 1.5 * draw(*shape)}
    for i in "12":
        weight = draw(channels, channels, 3, 3, 3) / (27 * channels) ** 0.5
        inputs |= {f"scale{i}": 1 + 0.3 * draw(channels), f"shift{i}": draw(channels)}
        inputs |= {f"weight{i}": weight, f"bias{i}": draw(channels)}
    return {name: value.to(dtype) for name, value in inputs.items()}


def block_flops(*, shape: list[int], dtype: torch.dtype) -> int:
    """Of the two convolutions, multiplications by the zeros of their padding included."""
    return 2 * 2 * 27 * shape[1] * prod(shape)


CASES = {
    "causal_conv3d": Cases(
        make=make_causal_conv3d,
        check=[
            {"shape": [0, 4, 3, 5, 8], "out": 4, "kernel": [3, 3, 3]},
            {"shape": [1, 1, 1, 1, 1], "out": 1, "kernel": [3, 3, 3]},
            # Too few frames for one result.
            {"shape": [1, 4, 1, 3, 5], "out": 4, "kernel": [4, 3, 3], "stride": [2, 1, 1]},
            # Emu3's own three, in ragged rows: one vector of every level and a rest.
            {
                "shape": [2, 4, 5, 7, 19],
                "out": 4,
                "kernel": [3, 3, 3],
                "norm": True,
                "activation": "silu",
                "residual": True,
            },
            {
                "shape": [1, 4, 5, 35, 50],
                "out": 4,
                "kernel": [4, 3, 3],
                "stride": [2, 1, 1],
                "post_activation": "silu",
            },
            {"shape": [2, 4, 4, 6, 33], "out": 4, "kernel": [3, 1, 1], "bias": False},
            # Whole vectors of every level, with no zeros behind a row.
            {"shape": [1, 16, 2, 5, 32], "out": 16, "kernel": [3, 3, 3], "activation": "silu"},
            # More channels than one register block, and neither number a multiple of it.
            {"shape": [1, 37, 2, 3, 9], "out": 10, "kernel": [3, 3, 3], "norm": True},
            # Everything at once: even kernels, strides in space that leave a rest, all gradients.
            {
                "shape": [2, 3, 6, 8, 133],
                "out": 5,
                "kernel": [3, 4, 5],
                "stride": [1, 2, 3],
                "norm": True,
                "activation": "silu",
                "post_activation": "silu",
                "residual": True,
            },
        ],
        time=[
            {"shape": [1, 4, 32, 64, 64], "out": 4, **BLOCK},  # half of a residual block of Emu3
            {"shape": [1, 8, 32, 64, 64], "out": 8, **BLOCK},
            {"shape": [1, 16, 32, 64, 64], "out": 16, **BLOCK},
            {"shape": [1, 64, 4, 64, 64], "out": 64, **BLOCK},  # the widest of our CPU kernels
            {"shape": [1, 4, 32, 64, 64], "out": 4, **DOWN},  # Emu3 halves the frames, twice
            {"shape": [1, 4, 32, 64, 64], "out": 4, "kernel": [3, 1, 1]},  # Emu3's quant_conv
            {"shape": [1, 4, 1, 90, 90], "out": 4, **BLOCK},  # one frame of 720 x 720
        ],
        flops=conv_flops,
    ),
    "temporal_residual": Cases(
        make=make_temporal_residual,
        check=[
            {"shape": [0, 4, 3, 5, 8]},
            {"shape": [1, 4, 0, 5, 8]},
            {"shape": [1, 1, 1, 1, 1]},
            {"shape": [1, 3, 3, 1, 9]},
            {"shape": [1, 16, 3, 6, 33]},
            {"shape": [1, 5, 2, 7, 20]},  # channels that fill no register block
            {"shape": [1, 8, 3, 35, 37]},  # rows beyond one tile of a thread, ragged
            {"shape": [2, 4, 5, 7, 39]},
        ],
        time=[
            {"shape": [1, 4, 32, 64, 64]},  # Emu3: 32 latent frames of 512 x 512
            {"shape": [1, 8, 32, 64, 64]},
            {"shape": [1, 16, 32, 64, 64]},
            {"shape": [1, 4, 1, 90, 90]},  # one image of 720 x 720
        ],
        flops=block_flops,
    ),
}
