"""GroupNorm and SpatialNorm with SiLU: the ops before every convolution of Emu3's vision tokenizer.

B images, C channels, G groups of C / G channels, H rows and W columns of pixels, T frames; the
latent of a spatial norm has L channels and h rows, w columns, t frames.

Backends take channels-last tensors: ``x [B, S, C]`` for the group norm, where S are the pixels of
all frames, and ``x [B, T, H, W, C]``, ``latent [B, t, h, w, L]`` for the spatial norm. ``forward``
takes the tensors in the order of the public function, then ``groups, eps, silu``, and returns y and
the backend's own float32 mean and rstd, or a tensor of both and None; ``backward`` takes dy, the
tensors, both statistics, ``groups, silu``, and returns a gradient for each of the tensors.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.group_norm import reference
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.runtime.layout import from_channels_last, to_channels_last, with_frames

GROUP_NORM_SILU = Backends(
    "group_norm_silu",
    __package__,
    reference.group_norm_silu,
    cpu=("cpu",),
    cuda=("triton",),
)
SPATIAL_NORM_SILU = Backends(
    "spatial_norm_silu",
    __package__,
    reference.spatial_norm_silu,
    cpu=("cpu",),
    cuda=("triton",),
)


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
    on the shape alone, on a GPU also on its number of multiprocessors.

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
        backend: a key of ``GROUP_NORM_SILU``, or None for the first that fits.

    Returns:
        The shape and dtype of ``x``, channels-last.
    """
    _check_group_norm("group_norm_silu", x, weight, bias, groups)
    chosen = GROUP_NORM_SILU.choose(backend, x, weight, bias)
    if chosen.function is not None:
        return chosen.function(x, weight, bias, groups, eps, silu)
    x = to_channels_last(x)
    args = x.flatten(1, -2), weight.contiguous(), bias.contiguous(), groups, eps, silu
    if needs_gradient(*args[:3]):
        y = _GroupNormSiLU.apply(*args, chosen)
    else:
        y, _, _ = chosen.forward(*args)
    return from_channels_last(y.view_as(x))


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu, backend):
        y, mean, rstd = backend.forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.settings, ctx.backend = (groups, silu), backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads = ctx.backend.backward(dy.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None, None, None


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
    of width 1, so that they commute with a nearest resize: they are computed at the resolution of
    the latent, and a pixel takes those of the position that ``F.interpolate(latent,
    mode="nearest")`` copies to it, at any ratio of sizes. ``group_norm``, its statistics and its
    precision are those of :func:`emu3_kernels.group_norm_silu`. Differentiable in every tensor;
    keeps the inputs and two float32 per group. Sums are ordered as there.

    Channels-last memory (``torch.channels_last``, ``torch.channels_last_3d``) is read as it is;
    any other layout is copied to it once. The result is channels-last. Emu3 decodes a
    video with statistics of each frame: pass it as B * T images.

    From "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation" (Zheng et al.,
    arXiv 2209.09002).

    Args:
        x: ``[B, C, H, W]`` or ``[B, C, T, H, W]``, any floating dtype.
        latent: ``[B, L, h, w]`` for images, ``[B, L, t, h, w]`` for videos; floating, on the
            device of ``x``. L is 4 in Emu3.
        weight: ``[C]``, floating, on the device of ``x``; of the group norm.
        bias: ``[C]`` likewise.
        y_weight: ``[C, L]`` likewise, as are the next three.
        y_bias: ``[C]``.
        b_weight: ``[C, L]``.
        b_bias: ``[C]``.
        groups: divides C; 32 in Emu3.
        eps: added to the variance; 1e-6 in Emu3.
        silu: False leaves the modulated x.
        backend: a key of ``SPATIAL_NORM_SILU``, or None for the first that fits.

    Returns:
        The shape and dtype of ``x``, channels-last.
    """
    op = "spatial_norm_silu"
    _check_group_norm(op, x, weight, bias, groups)
    _check_latent(op, x, latent)
    channels, latent_channels = x.shape[1], latent.shape[1]
    matrix = (channels, latent_channels)
    _check_parameters(op, x, matrix, y_weight=y_weight, b_weight=b_weight)
    _check_parameters(op, x, (channels,), y_bias=y_bias, b_bias=b_bias)
    parameters = weight, bias, y_weight, y_bias, b_weight, b_bias
    chosen = SPATIAL_NORM_SILU.choose(backend, x, latent, *parameters)
    if chosen.function is not None:
        return chosen.function(x, latent, *parameters, groups, eps, silu)
    is_image = x.dim() == 4
    x, latent = (with_frames(to_channels_last(tensor)) for tensor in (x, latent))
    args = x, latent, *(p.contiguous() for p in parameters), groups, eps, silu
    if needs_gradient(*args[:8]):
        y = _SpatialNormSiLU.apply(*args, chosen)
    else:
        y, _, _ = chosen.forward(*args)
    return from_channels_last(y.squeeze(1) if is_image else y)


class _SpatialNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, latent, w, b, yw, yb, bw, bb, groups, eps, silu, backend):
        tensors = x, latent, w, b, yw, yb, bw, bb
        y, mean, rstd = backend.forward(*tensors, groups, eps, silu)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.settings, ctx.backend = (groups, silu), backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads = ctx.backend.backward(dy.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None, None, None


def _check_group_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    if not x.is_floating_point():
        check_floating(op, x=x)
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be [B, C, H, W] or [B, C, T, H, W], got {describe(x)}")
    channels = x.shape[1]
    if groups < 1 or channels < groups or channels % groups:
        raise ValueError(
            f"{op}: groups must divide the channels of x, got {groups} of {tuple(x.shape)}"
        )
    _check_parameters(op, x, (channels,), weight=weight, bias=bias)


def _check_parameters(op: str, x: Tensor, shape: tuple[int, ...], **parameters: Tensor) -> None:
    """Raise unless every parameter has ``shape``, is floating and on the device of ``x``."""
    device = x.device
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            check_floating(op, **{name: parameter})
        if parameter.shape != shape or parameter.device != device:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} on {device} as x is {tuple(x.shape)}, "
                f"got {describe(parameter)}"
            )


def _check_latent(op: str, x: Tensor, latent: Tensor) -> None:
    check_floating(op, latent=latent)
    batch, _, *sizes = x.shape
    fits = latent.dim() == x.dim() and latent.shape[0] == batch and latent.device == x.device
    if not fits or 0 in latent.shape[1:]:
        axes = "t, h, w" if len(sizes) == 3 else "h, w"
        raise ValueError(
            f"{op}: latent must be [{batch}, L, {axes}] on {x.device} as x is "
            f"{tuple(x.shape)}, got {describe(latent)}"
        )
