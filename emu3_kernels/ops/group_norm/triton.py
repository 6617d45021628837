"""The group norms in Triton: moments and norm forward; sums, dx and parameters backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm import triton_apply, triton_spatial
from emu3_kernels.ops.group_norm.triton_apply import NO_MODULATION, silu_derivative
from emu3_kernels.ops.group_norm.triton_statistics import (
    Layout,
    channels_of,
    layout,
    load_channels,
    moments,
    store_terms,
)
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, tile, why_not_triton


def why_not(*tensors: Tensor) -> str | None:
    return next(filter(None, map(why_not_triton, tensors)), None)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, None]:
    """Return y and ``[B, 2, C]``: mean and rstd."""
    stats = x.new_empty(x.shape[0], 2, x.shape[-1], dtype=torch.float32)
    if not x.numel():
        return torch.empty_like(x), stats, None
    parted = layout(x, x.shape[1], groups)
    of_parts = moments(x, x.shape[1], parted)
    y = triton_apply.apply(x, of_parts, stats, weight, bias, NO_MODULATION, eps, silu, parted)
    return y, stats, None


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    _: None,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    parted = layout(x, x.shape[1], groups)
    sums, terms = _sums(dy, x, stats, weight, bias, silu, parted)
    dx = triton_apply.backward(dy, x, stats, terms, weight, bias, NO_MODULATION, silu, parted)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    options = tile(num_warps=4, ROWS=64, BLOCK=32)
    grid = (cdiv(2 * x.shape[-1], options["BLOCK"]),)
    launch(
        group_norm_bwd_add_kernel, grid, sums, dbias, dweight, sums.shape[0] * sums.shape[1],
        CHANNELS=x.shape[-1], **options,
    )  # fmt: skip
    return dx, dweight, dbias


def spatial_norm(
    x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor,
    b_weight: Tensor, b_bias: Tensor, groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Return y and ``[B, 2, C]``: mean and rstd."""
    stats = x.new_empty(x.shape[0], 2, x.shape[-1], dtype=torch.float32)
    if not x.numel():
        return torch.empty_like(x), stats, None
    num_pixels = x.shape[1] * x.shape[2] * x.shape[3]
    parted = layout(x, num_pixels, groups)
    of_parts = moments(x, num_pixels, parted)
    modulation = latent, y_weight, y_bias, b_weight, b_bias
    y = triton_apply.apply(x, of_parts, stats, weight, bias, modulation, eps, silu, parted)
    return y, stats, None


def spatial_norm_backward(
    dy: Tensor, x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor,
    y_bias: Tensor, b_weight: Tensor, b_bias: Tensor, stats: Tensor, _: None, groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = weight, bias, y_weight, y_bias, b_weight, b_bias
    if not x.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (x, latent, *parameters))
    modulation = latent, y_weight, y_bias, b_weight, b_bias
    parted = layout(x, x.shape[1] * x.shape[2] * x.shape[3], groups)
    sums = triton_spatial.position_sums(dy, x, stats, weight, bias, modulation, silu)
    dlatent = triton_spatial.latent_gradient(sums, weight, bias, modulation)
    weighted, terms = triton_spatial.weighted_sums(sums, weight, modulation, groups)
    dx = triton_apply.backward(dy, x, stats, terms, weight, bias, modulation, silu, parted)
    return dx, dlatent, *triton_spatial.parameter_gradients(weighted, *parameters)


def _sums(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, silu: bool, parted: Layout
) -> tuple[Tensor, Tensor]:
    """Return the sums of d and d * normed: ``[B, parts, 2, C]``; by weight ``[B, 2, parts, G]``."""
    batch, num_pixels, channels = x.shape
    parts, groups = parted.num_parts, channels // parted.constants["SIZE"]
    sums = x.new_empty(batch, parts, 2, channels, dtype=torch.float32)
    terms = x.new_empty(batch, 2, parts, groups, dtype=torch.float32)
    launch(
        group_norm_bwd_sums_kernel, (parts, parted.blocks, batch), dy, x, stats, weight, bias,
        sums, terms, num_pixels, parted.part, SILU=silu, **parted.constants,
    )  # fmt: skip
    return sums, terms


@triton.jit
def group_norm_bwd_sums_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, sums_ptr, terms_ptr, num_pixels, part,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of d = dy * silu'(...) and of d * normed over a part."""
    image, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c, exists = channels_of(block, CHANNELS, SIZE, WIDE, GROUPS)
    first = tl.program_id(0) * part
    num = tl.minimum(num_pixels - first, part)
    r = tl.arange(0, ROWS)
    stats_ptr += image * 2 * CHANNELS
    mean = load_channels(stats_ptr, c, exists)[None, :]
    rstd = load_channels(stats_ptr + CHANNELS, c, exists)[None, :]
    weight_c = load_channels(weight_ptr, c, exists)
    weight = weight_c[None, :]
    bias = load_channels(bias_ptr, c, exists)[None, :]
    sum_d = tl.zeros([ROWS, GROUPS * WIDE], tl.float32)
    sum_d_normed = tl.zeros([ROWS, GROUPS * WIDE], tl.float32)
    at = r[:, None] * CHANNELS + c[None, :]
    for row in range(0, num, ROWS):
        inside = (row + r < num)[:, None] & exists[None, :]
        base = (image * num_pixels + first + row) * CHANNELS
        d = tl.load(dy_ptr + base + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + base + at, mask=inside, other=0).to(tl.float32)
        normed = (x - mean) * rstd
        if SILU:
            d = d * silu_derivative(normed * weight + bias)
        sum_d += d
        sum_d_normed += d * normed
    num_parts = tl.num_programs(0)
    sums_ptr += (image * num_parts + tl.program_id(0)) * 2 * CHANNELS
    terms_ptr += image * 2 * num_parts * (CHANNELS // SIZE)
    total_d, total_d_normed = tl.sum(sum_d, axis=0), tl.sum(sum_d_normed, axis=0)
    tl.store(sums_ptr + c, total_d, mask=exists)
    tl.store(sums_ptr + CHANNELS + c, total_d_normed, mask=exists)
    store_terms(
        terms_ptr, total_d * weight_c, total_d_normed * weight_c, block, tl.program_id(0),
        num_parts, CHANNELS, SIZE, WIDE, GROUPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def group_norm_bwd_add_kernel(
    sums_ptr, dbias_ptr, dweight_ptr, num_rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dbias and dweight: the sums of ``[rows, 2, C]``."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < 2 * CHANNELS)[None, :]
        at = row.to(tl.int64)[:, None] * (2 * CHANNELS) + column[None, :]
        total += tl.load(sums_ptr + at, mask=inside, other=0)
    value = tl.sum(total, axis=0)
    is_bias, is_weight = column < CHANNELS, (column >= CHANNELS) & (column < 2 * CHANNELS)
    tl.store(dbias_ptr + column, value.to(dbias_ptr.dtype.element_ty), mask=is_bias)
    dweight_ptr += column - CHANNELS
    tl.store(dweight_ptr, value.to(dweight_ptr.dtype.element_ty), mask=is_weight)


BACKENDS = {
    "group_norm_silu": Backend(why_not, group_norm, group_norm_backward),
    "spatial_norm_silu": Backend(why_not, spatial_norm, spatial_norm_backward),
}
