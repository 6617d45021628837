"""SwiGLU: the gated activation of Emu3's feed-forward layers. C channels, R rows.

The kernels of a backend take rows ``[R, C]`` with unit stride in C:

    forward(gate, up) -> out
    backward(dout, gate, up) -> dgate_up [R, 2C]
"""

import torch
from torch import Tensor

from emu3_kernels.ops.swiglu import reference
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import (
    check_alike,
    check_floating,
    check_has_channels,
    rows,
    unrows,
)
from emu3_kernels.runtime.dispatch import Backends

SWIGLU, SWIGLU_PACKED = (
    Backends(op, __package__, reference.swiglu, cpu=("cpu",), cuda=("triton",))
    for op in ("swiglu", "swiglu_packed")
)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Gate ``up`` by the SiLU of ``gate``: ``out = gate * sigmoid(gate) * up``.

    Computed in float32 (float64 for float64 inputs) and rounded once, to the
    dtype of ``gate``. Differentiable in both inputs; the backward pass
    recomputes the sigmoid, so only the inputs are saved, and writes both
    gradients as the halves of one packed tensor. Rows may be strided (the
    halves of a packed projection): no copy is made.

    From "GLU Variants Improve Transformer" (Shazeer, arXiv 2002.05202).

    Args:
        gate: ``[..., C]``, any floating dtype.
        up: same shape, dtype and device as ``gate``.
        backend: ``"cpu"``, ``"triton"``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[..., C]`` in the dtype of ``gate``.
    """
    check_alike("swiglu", "gate and up", gate, up)
    if gate.dim() == 0:
        check_has_channels("swiglu", gate=gate)
    chosen = SWIGLU.choose(backend, gate)
    if chosen.function is not None:
        return chosen.function(gate, up)
    if needs_gradient(gate, up):
        out = _SwiGLU.apply(rows(gate), rows(up), chosen)
    else:
        out = chosen.forward(rows(gate), rows(up))
    return unrows(out, gate)


def swiglu_packed(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """:func:`swiglu` of the two halves of one projection, with one packed gradient.

    Args:
        gate_up: ``[..., 2C]``: gate in the first half, up in the second.
        backend: as in :func:`swiglu`.

    Returns:
        ``[..., C]`` in the dtype of ``gate_up``.
    """
    shape = gate_up.shape
    if not (shape and gate_up.is_floating_point()):
        check_floating("swiglu_packed", gate_up=gate_up)
        check_has_channels("swiglu_packed", gate_up=gate_up)
    if shape[-1] % 2:
        raise ValueError(f"swiglu_packed: gate_up must be [..., 2C], got shape {tuple(shape)}")
    chosen = SWIGLU_PACKED.choose(backend, gate_up)
    if chosen.function is not None:
        return chosen.function(*gate_up.chunk(2, dim=-1))
    packed = rows(gate_up)
    if needs_gradient(gate_up):
        out = _SwiGLUPacked.apply(packed, chosen)
    else:
        out = chosen.forward(*packed.chunk(2, dim=-1))
    return out if len(shape) == 2 else out.view(*shape[:-1], shape[-1] // 2)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return backend.forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dgate_up = ctx.backend.backward(rows(dout), *ctx.saved_tensors)
        return *dgate_up.chunk(2, dim=-1), None


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, backend):
        ctx.save_for_backward(gate_up)
        ctx.backend = backend
        return backend.forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (gate_up,) = ctx.saved_tensors
        return ctx.backend.backward(rows(dout), *gate_up.chunk(2, dim=-1)), None
