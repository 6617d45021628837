"""A 3x3 convolution of pictures and what is added to it, by fewer products.

B pictures, C channels in, O channels out, H rows and W columns.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.conv2d import reference
from emu3_kernels.runtime import library
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.gemm import autocast
from emu3_kernels.runtime.layout import from_channels_last, to_channels_last

HAS_TILES = library.cpu_levels()[-1:] == ("amx",)
"""Tiles of bfloat16 have sixteen times the rate of float32: oneDNN comes first where they are."""
BACKENDS = load("conv3x3", *(("aten", "cpu") if HAS_TILES else ("cpu", "aten")))


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve with zeros around and add: ``y = conv2d(x, weight, padding=1) + bias + residual``.

    Natively, bfloat16 is multiplied in float32 by Winograd's F(4x4, 3x3): a quarter of the products
    at half the rate, with an error that is lost in the rounding of the result. Computed in float32
    and rounded once. The rest is left to ``aten``, PyTorch's own convolution (oneDNN, cuDNN): GPUs;
    float32, whose last digits Winograd costs; channels that fill no block; pictures of fewer than
    128 tiles of 4x4, which do not pay for the weights' transform; and, unless native is asked for,
    processors with AMX. It rounds before it adds the residual. Differentiable in all tensors;
    ``torch.autocast`` narrows them.

    The native error is that of a whole 4x4 tile: in one that reads a pixel of 1e4, results of 4 or
    less are off by up to 0.04 (aten's by 0.008), and a NaN spoils all of the tile it lies in.

    Channels-last memory is read as it is, any other layout copied to it; native results are
    channels-last, and that of a picture does not depend on its batch.

    From "Fast Algorithms for Convolutional Neural Networks" (Lavin and Gray, arXiv 1509.09308).

    Args:
        x: ``[B, C, H, W]``, any floating dtype.
        weight: ``[O, C, 3, 3]`` in the dtype and on the device of ``x``, as are all that follow.
        bias: ``[O]``.
        residual: ``[B, O, H, W]`` or None.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, O, H, W]`` in the dtype of ``x``.
    """
    x, weight, bias = autocast(x), autocast(weight), autocast(bias)
    residual = None if residual is None else autocast(residual)
    _check(x, weight, bias, residual)
    chosen = choose("conv3x3", BACKENDS, backend, x, weight)
    if chosen == "reference":
        return reference.conv3x3(x, weight, bias, residual)
    if chosen == "aten":
        return BACKENDS[chosen].forward(x, weight, bias, residual)
    operands = to_channels_last(x), to_channels_last(weight), bias.contiguous()
    rest = None if residual is None else to_channels_last(residual)
    if needs_gradient(x, weight, bias, *(() if residual is None else (residual,))):
        return from_channels_last(_Conv3x3.apply(*operands, rest, chosen))
    return from_channels_last(BACKENDS[chosen].forward(*operands, rest))


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    check_floating("conv3x3", x=x)
    if x.dim() != 4:
        raise ValueError(f"conv3x3: x must be [B, C, H, W], got {describe(x)}")
    batch, channels, height, width = x.shape
    if weight.shape[1:] != (channels, 3, 3):
        raise ValueError(
            f"conv3x3: weight must be [O, {channels}, 3, 3] as x is {tuple(x.shape)}, "
            f"got {describe(weight)}"
        )
    out = len(weight)
    shapes = {"weight": (weight, weight.shape), "bias": (bias, (out,))}
    if residual is not None:
        shapes["residual"] = residual, (batch, out, height, width)
    for name, (tensor, shape) in shapes.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, x.dtype, x.device):
            raise ValueError(
                f"conv3x3: {name} must be {tuple(shape)} {x.dtype} {x.device}, "
                f"got {describe(tensor)}"
            )


class _Conv3x3(torch.autograd.Function):
    """On channels-last ``[B, H, W, C]`` and ``[O, 3, 3, C]``."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.has_residual = backend, residual is not None
        return BACKENDS[backend].forward(x, weight, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[:3]
        gradients = BACKENDS[ctx.backend].backward(dy, *ctx.saved_tensors, wanted)
        return *gradients, dy if ctx.has_residual else None, None
