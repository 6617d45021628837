"""Residual addition and RMSNorm in one pass, between two sublayers of a decoder. D channels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.norm import add_rms_norm_reference as reference
from emu3_kernels.runtime.autograd import mark_written, needs_gradient
from emu3_kernels.runtime.checks import (
    check_alike,
    check_channel_weight,
    check_no_gradient,
    copied,
    rows,
    unrows,
)
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.dropout import check_dropout, draw_seed

BACKENDS = load("add_rms_norm", "cpu", "triton")


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add, then normalise: ``summed = dropout(x) + residual``, ``y = rms_norm(summed, weight)``.

    The sum is rounded to the dtype of ``x`` before it is normalised, so that
    the pair equals the two steps apart; the rest is computed in float32 and
    rounded once. Differentiable in ``x``, ``residual`` and ``weight``, through
    both results; keeps ``summed`` and one float32 per row.

    Dropout multiplies the elements that it keeps by ``1 / (1 - dropout_p)`` in
    float32, and rounds their sum with the residual once. Which elements those
    are follows from ``seed``, row and channel alone: all backends keep the same,
    and the backward pass, or a checkpoint's second forward pass, keeps them
    again; only the seed is saved.

    Under ``torch.autocast`` the result of a sublayer is narrower than the stream: ``x`` and
    ``residual`` are promoted to one dtype there, as in PyTorch's sum.

    Args:
        x: ``[..., D]``, any floating dtype: what the last sublayer added.
        residual: same shape, dtype and device as ``x``: the stream it adds to.
        weight: ``[D]``, floating, on the device of ``x``.
        eps: added to the mean square; 1e-5 in Emu3.
        dropout_p: share of ``x`` that is dropped, in ``[0, 1)``.
        seed: 0-d int64 on the device of ``x``; None draws one from torch's default generator
            if there is dropout.
        out: where y and the sum go, for a call without a gradient: contiguous tensors like ``x``,
            which may be ``x`` and ``residual`` themselves.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``(y, summed)``, both ``[..., D]`` in the dtype of ``x``; ``summed`` is
        the residual of the next sublayer. ``out``, if given.
    """
    if torch.is_autocast_enabled(x.device.type):
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    check_alike("add_rms_norm", x=x, residual=residual)
    check_channel_weight("add_rms_norm", x, weight)
    check_dropout("add_rms_norm", dropout_p, seed, x.device)
    if out is not None:
        _check_out(x, residual, weight, out)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    chosen = choose("add_rms_norm", BACKENDS, backend, x, residual, weight, eps)
    if chosen == "reference":
        random = {"dropout_p": dropout_p, "seed": seed}
        results = reference.add_rms_norm(x, residual, weight, eps, **random)
        return results if out is None else copied(results, out)
    operands = rows(x), rows(residual), weight.contiguous(), eps, dropout_p, seed
    if out is not None:
        BACKENDS[chosen].forward_into(*map(rows, out), *operands)
        mark_written(*out)
        return out
    if needs_gradient(x, residual, weight):
        y, summed = _AddRMSNorm.apply(*operands, chosen)
    else:
        y, summed, _ = BACKENDS[chosen].forward(*operands)
    return unrows(y, x), unrows(summed, x)


def _check_out(x: Tensor, residual: Tensor, weight: Tensor, out: tuple[Tensor, Tensor]) -> None:
    check_no_gradient("add_rms_norm", x, residual, weight, *out)
    if len(out) != 2:
        raise ValueError(f"add_rms_norm: out must be two tensors, got {len(out)}")
    check_alike("add_rms_norm", x=x, y=out[0], summed=out[1])
    if _overlap(*out) or not all(written.is_contiguous() for written in out):
        got = " and ".join(f"strides {written.stride()}" for written in out)
        raise ValueError(
            f"add_rms_norm: out must be two contiguous tensors without a common element, got {got}"
        )


def _overlap(y: Tensor, summed: Tensor) -> bool:
    if y is summed or torch.compiler.is_compiling():  # traced tensors lie nowhere
        return y is summed
    return abs(y.data_ptr() - summed.data_ptr()) < y.nbytes


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, dropout_p, seed, backend):
        y, summed, rstd = BACKENDS[backend].forward(x, residual, weight, eps, dropout_p, seed)
        ctx.save_for_backward(summed, weight, rstd, seed)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsummed):
        *saved, seed = ctx.saved_tensors
        grads = BACKENDS[ctx.backend].backward(rows(dy), rows(dsummed), *saved, ctx.dropout_p, seed)
        return *grads, None, None, None, None
