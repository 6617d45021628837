"""SpatialNorm and SiLU in one: what stands before every convolution of Emu3's vision decoder.

B images, C channels, G groups of C / G channels, H rows and W columns of pixels, T frames; the
latent has L channels and h rows, w columns, t frames.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.group_norm import spatial_norm_silu_reference as reference
from emu3_kernels.ops.group_norm.checks import check_group_norm, check_parameters
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.layout import from_channels_last, to_channels_last, with_frames

BACKENDS = load("spatial_norm_silu", "cpu", "triton")


def spatial_norm_silu(
    x: Tensor,
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_weight: Tensor,
    y_bias: Tensor,
    b_weight: Tensor,
    b_bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise ``x``, modulate it by the latent and apply SiLU: ``silu(group_norm(x) * y + b)``.

    ``y = latent @ y_weight.T + y_bias`` and ``b = latent @ b_weight.T + b_bias`` are convolutions
    of width 1, so that they commute with a nearest resize: they are computed where the latent lies,
    and a pixel takes those of the place that ``F.interpolate(latent, mode="nearest")`` shows there,
    at any ratio of sizes. ``group_norm``, its statistics and its precision are those of
    :func:`emu3_kernels.group_norm_silu`. Differentiable in every tensor; keeps the inputs and two
    float32 per group. Sums have an order that depends on the shapes alone.

    Channels-last memory (``torch.channels_last``, ``torch.channels_last_3d``) is read as it is;
    any other layout is copied to it once. The result is channels-last. A video that Emu3 decodes
    has statistics of its own in every frame: pass it as B * T pictures.

    From "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation" (Zheng et al.,
    arXiv 2209.09002).

    Args:
        x: ``[B, C, H, W]`` or ``[B, C, T, H, W]``, any floating dtype.
        latent: ``[B, L, h, w]`` beside pictures, ``[B, L, t, h, w]`` beside videos; floating, on
            the device of ``x``. L is 4 in Emu3.
        weight: ``[C]``, floating, on the device of ``x``; the scale of the group norm.
        bias: ``[C]`` likewise.
        y_weight: ``[C, L]`` likewise, as are the next three.
        y_bias: ``[C]``.
        b_weight: ``[C, L]``.
        b_bias: ``[C]``.
        groups: divides C; 32 in Emu3.
        eps: added to the variance; 1e-6 in Emu3.
        silu: False leaves the modulated x.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        The shape and dtype of ``x``, channels-last.
    """
    op = "spatial_norm_silu"
    check_group_norm(op, x, weight, bias, groups)
    _check_latent(op, x, latent)
    channels, width = x.shape[1], latent.shape[1]
    check_parameters(op, x, (channels, width), y_weight=y_weight, b_weight=b_weight)
    check_parameters(op, x, (channels,), y_bias=y_bias, b_bias=b_bias)
    parameters = weight, bias, y_weight, y_bias, b_weight, b_bias
    chosen = choose(op, BACKENDS, backend, x, latent, *parameters)
    if chosen == "reference":
        return reference.spatial_norm_silu(x, latent, *parameters, groups, eps, silu)
    images = (with_frames(to_channels_last(image)) for image in (x, latent))
    operands = *images, *(p.contiguous() for p in parameters), groups, eps, silu
    if needs_gradient(x, latent, *parameters):
        y = _SpatialNormSiLU.apply(*operands, chosen)
    else:
        y, _, _ = BACKENDS[chosen].forward(*operands)
    return from_channels_last(y if x.dim() == 5 else y.squeeze(1))


class _SpatialNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, latent, w, b, yw, yb, bw, bb, groups, eps, silu, backend):
        tensors = x, latent, w, b, yw, yb, bw, bb
        y, mean, rstd = BACKENDS[backend].forward(*tensors, groups, eps, silu)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.settings, ctx.backend = (groups, silu), backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = dy.contiguous(), *ctx.saved_tensors
        gradients = BACKENDS[ctx.backend].backward(*tensors, *ctx.settings)
        return *gradients, None, None, None, None


def _check_latent(op: str, x: Tensor, latent: Tensor) -> None:
    check_floating(op, latent=latent)
    batch, _, *pixels = x.shape
    fits = latent.dim() == x.dim() and latent.shape[0] == batch and latent.device == x.device
    if not fits or 0 in latent.shape[1:]:
        places = "t, h, w" if len(pixels) == 3 else "h, w"
        raise ValueError(
            f"{op}: latent must be [{batch}, L, {places}] on {x.device} as x is "
            f"{tuple(x.shape)}, got {describe(latent)}"
        )
