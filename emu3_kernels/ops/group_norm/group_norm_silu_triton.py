"""group_norm_silu in Triton: moments, statistics and norm; sums, slopes and gradient."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm import triton_pixels as pixels
from emu3_kernels.ops.group_norm import triton_statistics as statistics
from emu3_kernels.runtime.launch import Config, Contract, meta, why_not_triton


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return next(filter(None, map(why_not_triton, (x, weight, bias))), None)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        nothing = x.new_empty(x.shape[0], x.shape[-1], dtype=torch.float32)
        return x.new_empty(x.shape), nothing, nothing
    mean, rstd = statistics.statistics(x, groups, eps)
    return pixels.apply(x, mean, rstd, weight, bias, None, None, silu), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    sums = _sums(dy, x, mean, rstd, weight, bias, silu)
    totals, slopes = statistics.slopes(sums, rstd, weight, groups, x.shape[1])
    dx = pixels.backward(dy, x, mean, rstd, weight, bias, slopes, None, None, silu)
    dbias, dweight = totals.sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> Tensor:
    batch, num_pixels, channels = x.shape
    rows, tile = statistics.tile_of(channels)
    part = statistics.parts_of(num_pixels, channels)
    num_parts = triton.cdiv(num_pixels, part)
    sums = x.new_empty(batch, num_parts, 2, channels, dtype=torch.float32)
    _sums_kernel[(num_parts, triton.cdiv(channels, tile.block), batch)](
        dy, x, mean, rstd, weight, bias, sums, num_pixels, channels, part, SILU=silu, ROWS=rows,
        **tile.options(),
    )  # fmt: skip
    return sums


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr, num_pixels, channels, part,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of d = dy * silu'(...) and of d * normed over a part."""
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * part
    num = tl.minimum(num_pixels - first, part)
    r = tl.arange(0, ROWS)
    mean = pixels.load_channels(mean_ptr + image * channels, c, channels)[None, :]
    rstd = pixels.load_channels(rstd_ptr + image * channels, c, channels)[None, :]
    weight = pixels.load_channels(weight_ptr, c, channels)[None, :]
    bias = pixels.load_channels(bias_ptr, c, channels)[None, :]
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    times_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num, ROWS):
        inside = (row + r < num)[:, None] & (c < channels)[None, :]
        at = (image * num_pixels + first + row + r)[:, None] * channels + c[None, :]
        d = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        if SILU:
            d = d * pixels.silu_gradient(normed * weight + bias)
        plain += d
        times_normed += d * normed
    out = (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(plain, axis=0), mask=c < channels)
    tl.store(sums_ptr + out + channels, tl.sum(times_normed, axis=0), mask=c < channels)


def _run_forward(*shape: int) -> None:
    channels = shape[-1]
    forward(meta(*shape), meta(channels), meta(channels), 32, 1e-6, True)


def _run_backward(*shape: int) -> None:
    batch, _, channels = shape
    of_group = (meta(batch, channels, dtype=torch.float32) for _ in range(2))
    x, weight = meta(*shape), meta(channels)
    backward(x, x, weight, weight, *of_group, 32, True)


# Scalars are the channels' numbers, of which a thread of a tile of 128 channels loads one.
FORWARD = statistics.FORWARD | {"_apply_kernel": Contract(max_registers=64, scalar_loads=4)}
BACKWARD = statistics.BACKWARD | {
    "_sums_kernel": Contract(max_registers=128, scalar_loads=4, scalar_stores=2),
    "_bwd_kernel": Contract(max_registers=128, scalar_loads=6),
}
CONFIGS = tuple(
    Config(f"{' x '.join(map(str, shape))}{way}", partial(run, *shape), contracts)
    for shape in ((1, 512 * 512, 256), (1, 64 * 64, 1024))
    for way, run, contracts in (("", _run_forward, FORWARD), (", back", _run_backward, BACKWARD))
)
