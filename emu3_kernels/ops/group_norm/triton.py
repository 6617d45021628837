"""The group norms in Triton: moments and norm forward; sums, dx and parameters backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.group_norm import triton_apply, triton_spatial
from emu3_kernels.ops.group_norm.triton_apply import NO_MODULATION
from emu3_kernels.ops.group_norm.triton_statistics import (
    channels_of,
    layout,
    load_channels,
    moments,
    store_terms,
)
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import (
    Gpu,
    LaunchPlan,
    cdiv,
    gpu_of,
    launch_planned,
    plan_launch,
    planned,
    tile,
    why_not_triton,
)
from emu3_kernels.runtime.triton_silu import silu_derivative


def why_not(*tensors: Tensor) -> str | None:
    return next(filter(None, map(why_not_triton, tensors)), None)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, None]:
    """Return y and ``[B, 2, C]``: mean and rstd."""
    stats = x.new_empty(x.shape[0], 2, x.shape[-1], dtype=torch.float32)
    if not x.numel():
        return torch.empty_like(x), stats, None
    y = triton_apply.apply(x, moments(x, groups), stats, weight, bias, NO_MODULATION, eps, silu)
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
    sums, terms = _sums(dy, x, stats, weight, bias, groups, silu)
    dx = triton_apply.backward(dy, x, stats, terms, weight, bias, NO_MODULATION, silu)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    launch_planned(group_norm_bwd_add_kernel, plan_add(sums.shape), sums, dbias, dweight)
    return dx, dweight, dbias


@planned
def plan_add(sums: torch.Size) -> LaunchPlan:
    batch, num_parts, _, channels = sums
    options = tile(num_warps=4, ROWS=64, BLOCK=32)
    grid = (cdiv(2 * channels, options["BLOCK"]),)
    return plan_launch(grid, batch * num_parts, CHANNELS=channels, **options)


def spatial_norm(
    x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor,
    b_weight: Tensor, b_bias: Tensor, groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Return y and ``[B, 2, C]``: mean and rstd."""
    stats = x.new_empty(x.shape[0], 2, x.shape[-1], dtype=torch.float32)
    if not x.numel():
        return torch.empty_like(x), stats, None
    modulation = latent, y_weight, y_bias, b_weight, b_bias
    y = triton_apply.apply(x, moments(x, groups), stats, weight, bias, modulation, eps, silu)
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
    sums = triton_spatial.position_sums(dy, x, stats, weight, bias, modulation, silu)
    dlatent = triton_spatial.latent_gradient(sums, weight, bias, modulation)
    weighted, terms = triton_spatial.weighted_sums(sums, weight, modulation, groups)
    dx = triton_apply.backward(dy, x, stats, terms, weight, bias, modulation, silu)
    return dx, dlatent, *triton_spatial.parameter_gradients(weighted, *parameters)


def _sums(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return the sums of d and d * normed: ``[B, parts, 2, C]``; by weight ``[B, 2, parts, G]``."""
    num_parts, plan = plan_sums(x.shape, groups, silu, gpu_of(x))
    sums = x.new_empty(x.shape[0], num_parts, 2, x.shape[2], dtype=torch.float32)
    terms = x.new_empty(x.shape[0], 2, num_parts, groups, dtype=torch.float32)
    launch_planned(group_norm_bwd_sums_kernel, plan, dy, x, stats, weight, bias, sums, terms)
    return sums, terms


@planned
def plan_sums(shape: torch.Size, groups: int, silu: bool, gpu: Gpu) -> tuple[int, LaunchPlan]:
    parted = layout(shape, groups, gpu)
    grid = parted.num_parts, parted.blocks, shape[0]
    plan = plan_launch(grid, parted.num_pixels, parted.part, SILU=silu, **parted.constants)
    return parted.num_parts, plan


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
