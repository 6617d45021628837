"""GroupNorm and SiLU in one: what stands before every convolution of Emu3's vision encoder.

B images, C channels, G groups of C / G channels, H rows and W columns of pixels, T frames.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.group_norm import group_norm_silu_reference as reference
from emu3_kernels.ops.group_norm.checks import check_group_norm
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.layout import from_channels_last, to_channels_last

BACKENDS = load("group_norm_silu", "cpu", "triton")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise each group of channels and apply SiLU: ``y = silu(normed * weight + bias)``.

    ``normed = (x - mean) * rsqrt(var + eps)``, with the mean and the (biased) variance of a group's
    C / G channels over all its pixels, of all frames. Statistics are merged block by block (Chan),
    never a difference of mean squares, so that a large mean costs no digits. Computed in float32
    (float64 for float64 inputs) and rounded once, to the dtype of ``x``. Differentiable in ``x``,
    ``weight`` and ``bias``; keeps ``x`` and two float32 per group. Sums have an order that depends
    on the shape alone.

    Channels-last memory (``torch.channels_last``, ``torch.channels_last_3d``) is read as it is;
    any other layout is copied to it once. The result is channels-last.

    From "Group Normalization" (Wu and He, arXiv 1803.08494).

    Args:
        x: ``[B, C, H, W]`` or ``[B, C, T, H, W]``, any floating dtype.
        weight: ``[C]``, floating, on the device of ``x``.
        bias: ``[C]`` likewise.
        groups: divides C; 32 in Emu3.
        eps: added to the variance; 1e-6 in Emu3.
        silu: False leaves the normalised x, scaled and shifted.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        The shape and dtype of ``x``, channels-last.
    """
    check_group_norm("group_norm_silu", x, weight, bias, groups)
    chosen = choose("group_norm_silu", BACKENDS, backend, x, weight, bias)
    if chosen == "reference":
        return reference.group_norm_silu(x, weight, bias, groups, eps, silu)
    pixels = to_channels_last(x)
    operands = pixels.flatten(1, -2), weight.contiguous(), bias.contiguous(), groups, eps, silu
    if needs_gradient(x, weight, bias):
        y = _GroupNormSiLU.apply(*operands, chosen)
    else:
        y, _, _ = BACKENDS[chosen].forward(*operands)
    return from_channels_last(y.view(pixels.shape))


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu, backend):
        y, mean, rstd = BACKENDS[backend].forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.settings, ctx.backend = (groups, silu), backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = dy.contiguous(), *ctx.saved_tensors
        gradients = BACKENDS[ctx.backend].backward(*tensors, *ctx.settings)
        return *gradients, None, None, None, None
