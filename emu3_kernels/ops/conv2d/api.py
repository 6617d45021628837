"""A 3x3 convolution of images plus a residual, by Winograd's algorithm on the CPU.

B images, C input channels, O output channels, H rows and W columns.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv2d import reference
from emu3_kernels.runtime import library
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.runtime.gemm import autocast
from emu3_kernels.runtime.layout import from_channels_last, to_channels_last

HAS_TILES = library.cpu_levels()[-1:] == ("amx",)
"""AMX tiles have sixteen times the rate of float32 in bfloat16: oneDNN comes first with AMX."""
CONV3X3 = Backends(
    "conv3x3",
    __package__,
    reference.conv3x3,
    cpu=("aten", "cpu") if HAS_TILES else ("cpu", "aten"),
    cuda=("triton", "aten"),
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve with zeros around and add: ``y = conv2d(x, weight, padding=1) + bias + residual``.

    The backend ``cpu`` computes bfloat16 in float32 by Winograd's F(4x4, 3x3), with a quarter of
    the multiplications at half the rate, and rounds once; the error of the algorithm is lost in
    that rounding. All other calls run on ``aten``, PyTorch's own convolution (oneDNN, cuDNN), which
    rounds before it adds the residual: float32, since Winograd is less precise; channels that
    are not multiples of 16 and 64; images of fewer than 128 tiles of 4x4, since the transform of
    the weights costs more than it saves; and processors with AMX, unless ``cpu`` is asked for by
    name. ``triton`` runs the convolution of cuDNN, which rounds, and adds bias and residual in one
    kernel. In float32 on a GPU cuDNN rounds operands to TF32 while
    ``torch.backends.cudnn.allow_tf32`` is set. Differentiable in all tensors; ``torch.autocast``
    casts them.

    The error of ``cpu`` is relative to the largest value of a 4x4 tile and its border: next to a
    pixel of 1e4, results of 4 or less are off by up to 0.04 (aten's by 0.008), and a NaN spreads
    to the whole tile.

    Channels-last memory is read in place, any other layout is copied to it. Results of ``cpu`` are
    channels-last, and that of an image does not depend on the rest of its batch.

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
    chosen = CONV3X3.choose(backend, x, weight)
    if chosen.function is not None:
        return chosen.function(x, weight, bias, residual)
    operands = to_channels_last(x), to_channels_last(weight), bias.contiguous()
    rest = None if residual is None else to_channels_last(residual)
    if needs_gradient(x, weight, bias, *(() if residual is None else (residual,))):
        return from_channels_last(_Conv3x3.apply(*operands, rest, chosen))
    return from_channels_last(chosen.forward(*operands, rest))


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
        return backend.forward(x, weight, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gradients = ctx.backend.backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[:3])
        return *gradients, dy if ctx.has_residual else None, None
