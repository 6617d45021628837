"""RMSNorm, alone or of a residual sum: the normalisation of every Emu3 layer. D channels, R rows.

The kernels of a backend serve both ops, on rows ``[R, D]`` with unit stride in D:

    forward(x, residual, weight, eps, dropout_p, seed, dropout_rows, out=None)
        -> y, summed, rstd [R]
    backward(dy, dsummed, summed, weight, rstd, dropout_p, seed, dropout_rows)
        -> dx, dresidual, dweight

``residual``, ``dsummed`` and ``dresidual`` are None in rms_norm, whose ``summed`` is ``x`` itself.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.norm import reference
from emu3_kernels.runtime.autograd import mark_written, needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import (
    check_alike,
    check_channel_weight,
    check_no_gradient,
    copied,
    rows,
    unrows,
)
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.runtime.dropout import check_dropout, check_dropout_rows, draw_seed

RMS_NORM = Backends("rms_norm", __package__, reference.rms_norm, cpu=("cpu",), cuda=("triton",))
ADD_RMS_NORM = Backends(
    "add_rms_norm", __package__, reference.add_rms_norm, cpu=("cpu",), cuda=("triton",)
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    r"""Normalise by the root mean square: ``y = x * rsqrt(mean(x**2, -1) + eps) * weight``.

    Computed in float32 (float64 for float64 inputs) and rounded once, to the
    dtype of ``x``. Differentiable in ``x`` and ``weight``; saves ``x`` and one
    float32 per row. The gradient of ``weight`` is summed in float32 in an order
    that depends on the shape alone.

    From "Root Mean Square Layer Normalization" (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, floating, on the device of ``x``.
        eps: added to the mean square; 1e-5 in Emu3.
        backend: ``"cpu"``, ``"triton"``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    check_channel_weight("rms_norm", x, weight)
    chosen = RMS_NORM.choose(backend, x, weight)
    if chosen.function is not None:
        return chosen.function(x, weight, eps)
    inputs = rows(x), None, weight.contiguous(), eps, 0.0, None, None
    if needs_gradient(x, weight):
        y = _RMSNorm.apply(*inputs, chosen)
    else:
        y, _, _ = chosen.forward(*inputs)
    return unrows(y, x)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_rows: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add, then normalise: ``summed = dropout(x) + residual``, ``y = rms_norm(summed, weight)``.

    The sum is rounded to the dtype of ``x`` before it is normalised, so that
    the result equals that of two separate ops; the rest is computed in float32
    and rounded once. Differentiable in ``x``, ``residual`` and ``weight``,
    through both results; saves ``summed`` and one float32 per row.

    Dropout multiplies the kept elements by ``1 / (1 - dropout_p)`` in float32 and
    rounds their sum with the residual once. The mask depends on ``seed``, row and
    channel alone: it is the same on all backends, in the backward pass and in the
    second forward pass of a checkpoint, and only the seed is saved.

    Under ``torch.autocast`` the result of a sublayer has a narrower dtype than the residual
    stream: ``x`` and ``residual`` are promoted to one dtype there, as in PyTorch's sum.

    Args:
        x: ``[..., D]``, any floating dtype: the result of the last sublayer.
        residual: same shape, dtype and device as ``x``: the residual stream.
        weight: ``[D]``, floating, on the device of ``x``.
        eps: added to the mean square; 1e-5 in Emu3.
        dropout_p: probability that an element of ``x`` is dropped, in ``[0, 1)``.
        seed: 0-d int64 on the device of ``x``; None draws one from torch's default generator
            if there is dropout.
        dropout_rows: ``[...]`` int64, the row of the mask of each row of ``x``, of which the lower
            32 bits are used; None counts them from 0. A rank that passes the rows that it holds
            of the whole drops what the whole would.
        out: tensors for y and the sum, for a call without a gradient: contiguous, like ``x``;
            they may be ``x`` and ``residual`` themselves.
        backend: ``"cpu"``, ``"triton"``, ``"reference"``, or None for the first that fits.

    Returns:
        ``(y, summed)``, both ``[..., D]`` in the dtype of ``x``; ``summed`` is
        the residual of the next sublayer. ``out``, if given.
    """
    if x.dtype != residual.dtype and torch.is_autocast_enabled(x.device.type):
        common = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(common), residual.to(common)
    check_alike("add_rms_norm", "x and residual", x, residual)
    check_channel_weight("add_rms_norm", x, weight)
    check_dropout("add_rms_norm", dropout_p, seed, x.device)
    if out is not None:
        _check_out(x, residual, weight, out)
    if dropout_p == 0:
        seed = dropout_rows = None
    elif seed is None:
        seed = draw_seed(x.device)
    if dropout_rows is not None:
        check_dropout_rows("add_rms_norm", x, dropout_rows)
    chosen = ADD_RMS_NORM.choose(backend, x, weight)
    if chosen.function is not None:
        dropout = {"dropout_p": dropout_p, "seed": seed, "dropout_rows": dropout_rows}
        results = chosen.function(x, residual, weight, eps, **dropout)
        return results if out is None else copied(results, out)
    if dropout_rows is not None:
        dropout_rows = dropout_rows.flatten()
    dropout = dropout_p, seed, dropout_rows
    inputs = rows(x), rows(residual), weight.contiguous(), eps, *dropout
    if out is not None:
        chosen.forward(*inputs, (rows(out[0]), rows(out[1])))
        mark_written(*out)
        return out
    if needs_gradient(x, residual, weight):
        y, summed = _RMSNorm.apply(*inputs, chosen)
    else:
        y, summed, _ = chosen.forward(*inputs)
    return unrows(y, x), unrows(summed, x)


class _RMSNorm(torch.autograd.Function):
    """Returns y, and summed if there is a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, dropout_p, seed, dropout_rows, backend):
        dropout = dropout_p, seed, dropout_rows
        y, summed, rstd = backend.forward(x, residual, weight, eps, *dropout)
        ctx.save_for_backward(summed, weight, rstd, seed, dropout_rows)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return y if residual is None else (y, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsummed=None):
        *saved, seed, dropout_rows = ctx.saved_tensors
        dsummed = None if dsummed is None else rows(dsummed)
        dropout = ctx.dropout_p, seed, dropout_rows
        grads = ctx.backend.backward(rows(dy), dsummed, *saved, *dropout)
        return *grads, *[None] * 5


def _check_out(x: Tensor, residual: Tensor, weight: Tensor, out: tuple[Tensor, Tensor]) -> None:
    check_no_gradient("add_rms_norm", x, residual, weight, *out)
    if len(out) != 2:
        raise ValueError(f"add_rms_norm: out must be two tensors, got {len(out)}")
    check_alike("add_rms_norm", "x and y and summed", x, *out)
    if _overlap(*out) or not all(written.is_contiguous() for written in out):
        got = " and ".join(f"strides {written.stride()}" for written in out)
        raise ValueError(
            f"add_rms_norm: out must be two contiguous tensors without a common element, got {got}"
        )


def _overlap(y: Tensor, summed: Tensor) -> bool:
    if y is summed or torch.compiler.is_compiling():  # a traced tensor has no address
        return y is summed
    return abs(y.data_ptr() - summed.data_ptr()) < y.nbytes
