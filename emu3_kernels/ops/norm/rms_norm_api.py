"""RMSNorm: the normalisation of every Emu3 layer. D channels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.norm import rms_norm_reference as reference
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_channel_weight, rows, unrows
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("rms_norm", "cpu", "triton")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    r"""Normalise by the root mean square: ``y = x * rsqrt(mean(x**2, -1) + eps) * weight``.

    Computed in float32 (float64 for float64 inputs) and rounded once, to the
    dtype of ``x``. Differentiable in ``x`` and ``weight``; keeps ``x`` and one
    float32 per row. The gradient of ``weight`` is summed in float32 in an order
    that depends on the shape alone.

    From "Root Mean Square Layer Normalization" (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, floating, on the device of ``x``.
        eps: added to the mean square; 1e-5 in Emu3.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    check_channel_weight("rms_norm", x, weight)
    chosen = choose("rms_norm", BACKENDS, backend, x, weight, eps)
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps)
    operands = rows(x), weight.contiguous(), eps
    if needs_gradient(x, weight):
        y = _RMSNorm.apply(*operands, chosen)
    else:
        y, _ = BACKENDS[chosen].forward(*operands)
    return unrows(y, x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        y, rstd = BACKENDS[backend].forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dweight = BACKENDS[ctx.backend].backward(rows(dy), *ctx.saved_tensors)
        return dx, dweight, None, None
