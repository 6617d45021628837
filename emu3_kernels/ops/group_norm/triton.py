"""The group norms in Triton: moments, statistics and norm forward; sums, groups and dx backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm import triton_apply, triton_spatial
from emu3_kernels.ops.group_norm.triton_apply import load_channels, silu_derivative
from emu3_kernels.ops.group_norm.triton_statistics import (
    gradient_terms,
    part_length,
    pixel_tile,
    statistics,
)
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, why_not_triton


def why_not(*tensors: Tensor) -> str | None:
    return next(filter(None, map(why_not_triton, tensors)), None)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        empty = x.new_empty(x.shape[0], x.shape[-1], dtype=torch.float32)
        return x.new_empty(x.shape), empty, empty
    mean, rstd = statistics(x, groups, eps)
    return triton_apply.apply(x, mean, rstd, weight, bias, None, None, silu), mean, rstd


def group_norm_backward(
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
    totals, terms = gradient_terms(sums, rstd, weight, groups, x.shape[1])
    dx = triton_apply.backward(dy, x, mean, rstd, weight, bias, terms, None, None, silu)
    dbias, dweight = totals.sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def spatial_norm(
    x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor,
    b_weight: Tensor, b_bias: Tensor, groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not x.numel():
        empty = x.new_empty(x.shape[0], x.shape[-1], dtype=torch.float32)
        return x.new_empty(x.shape), empty, empty
    table = _modulation_table(y_weight, y_bias, b_weight, b_bias)
    mean, rstd = statistics(x.flatten(1, 3), groups, eps)
    return triton_apply.apply(x, mean, rstd, weight, bias, latent, table, silu), mean, rstd


def spatial_norm_backward(
    dy: Tensor, x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor,
    y_bias: Tensor, b_weight: Tensor, b_bias: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = weight, bias, y_weight, y_bias, b_weight, b_bias
    if not x.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (x, latent, *parameters))
    table = _modulation_table(y_weight, y_bias, b_weight, b_bias)
    norm = mean, rstd, weight, bias
    sums = triton_spatial.position_sums(dy, x, *norm, latent, table, silu)
    dlatent = triton_spatial.latent_gradient(sums, latent, weight, bias, table)
    of_norm = triton_spatial.weighted_sums(sums, latent, table, of_norm=True)[:, 0]
    totals, terms = gradient_terms(of_norm, rstd, weight, groups, x[0, ..., 0].numel())
    dx = triton_apply.backward(dy, x, *norm, terms, latent, table, silu)
    dbias, dweight = totals.sum(0)
    by_latent = triton_spatial.weighted_sums(sums, latent, table, of_norm=False)
    db, sum_d_normed = by_latent.sum((0, 2)).unbind(1)
    dy_table = weight.float() * sum_d_normed + bias.float() * db
    grads = dweight, dbias, dy_table[:-1].T, dy_table[-1], db[:-1].T, db[-1]
    cast = (g.to(p.dtype).contiguous() for g, p in zip(grads, parameters, strict=True))
    return dx, dlatent, *cast


def _modulation_table(y_weight: Tensor, y_bias: Tensor, b_weight: Tensor, b_bias: Tensor) -> Tensor:
    """Store the columns as rows, ``[2 * (L + 1), C]``: channels are contiguous."""
    return torch.cat([y_weight.T, y_bias[None], b_weight.T, b_bias[None]])


def _sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> Tensor:
    batch, num_pixels, channels = x.shape
    options = pixel_tile(channels)
    part = part_length(num_pixels, channels)
    num_parts = cdiv(num_pixels, part)
    sums = x.new_empty(batch, num_parts, 2, channels, dtype=torch.float32)
    grid = num_parts, cdiv(channels, options["BLOCK"]), batch
    launch(
        group_norm_bwd_sums_kernel, grid, dy, x, mean, rstd, weight, bias, sums, num_pixels,
        channels, part, SILU=silu, **options,
    )  # fmt: skip
    return sums


@triton.jit
def group_norm_bwd_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr, num_pixels, channels, part,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of d = dy * silu'(...) and of d * normed over a part."""
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * part
    num = tl.minimum(num_pixels - first, part)
    r = tl.arange(0, ROWS)
    mean = load_channels(mean_ptr + image * channels, c, channels)[None, :]
    rstd = load_channels(rstd_ptr + image * channels, c, channels)[None, :]
    weight = load_channels(weight_ptr, c, channels)[None, :]
    bias = load_channels(bias_ptr, c, channels)[None, :]
    sum_d = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_d_normed = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num, ROWS):
        inside = (row + r < num)[:, None] & (c < channels)[None, :]
        at = (image * num_pixels + first + row + r)[:, None] * channels + c[None, :]
        d = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        if SILU:
            d = d * silu_derivative(normed * weight + bias)
        sum_d += d
        sum_d_normed += d * normed
    out = (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(sum_d, axis=0), mask=c < channels)
    tl.store(sums_ptr + out + channels, tl.sum(sum_d_normed, axis=0), mask=c < channels)


BACKENDS = {
    "group_norm_silu": Backend(why_not, group_norm, group_norm_backward),
    "spatial_norm_silu": Backend(why_not, spatial_norm, spatial_norm_backward),
}
