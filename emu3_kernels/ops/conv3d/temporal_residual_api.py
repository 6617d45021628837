"""The residual block of Emu3's temporal path. B batch, C channels, T frames, H rows, W columns."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.conv3d import temporal_residual_reference as reference
from emu3_kernels.ops.conv3d.plan import Plan, Wanted, check_vectors, check_weight, check_x
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("temporal_residual", "cpu", "triton")
PLAN = Plan(silu=True)
KERNEL = (3, 3, 3)


def temporal_residual(
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Add two causal convolutions: ``y = x + conv(silu(scale2 * hidden + shift2))``.

    ``hidden = conv(silu(scale1 * x + shift1))``; the norms are folded into scales and shifts, and
    both convolutions are :func:`causal_conv3d` with a kernel of 3 x 3 x 3, a bias and stride 1. One
    pass over ``x``: ``hidden`` stays in the caches of the processor.

    Computed in float32 (float64 for float64 inputs; see :func:`causal_conv3d` for bfloat16);
    ``hidden`` and ``y`` are each rounded once, to the dtype of ``x``, so that the result is, bit
    for bit on every backend but the reference, that of two calls of :func:`causal_conv3d`, the
    second with ``residual=x``, which can be streamed.
    Differentiable in all tensors, in two passes that keep ``x`` and ``hidden``.

    From Emu3's vision tokenizer, ``Emu3VisionVQResnetTemporalBlock`` (arXiv 2409.18869).

    Args:
        x: ``[B, C, T, H, W]``, any floating dtype, any strides (copied if not contiguous).
        scale1: ``[C]``, floating, as are all that follow, in any dtype.
        shift1: ``[C]``.
        weight1: ``[C, C, 3, 3, 3]``.
        bias1: ``[C]``.
        scale2: ``[C]``.
        shift2: ``[C]``.
        weight2: ``[C, C, 3, 3, 3]``.
        bias2: ``[C]``.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, C, T, H, W]`` in the dtype of ``x``.
    """
    check_x("temporal_residual", x)
    _check_weights(x, weight1=weight1, weight2=weight2)
    vectors = {"scale1": scale1, "shift1": shift1, "bias1": bias1}
    vectors |= {"scale2": scale2, "shift2": shift2, "bias2": bias2}
    check_vectors("temporal_residual", x, x.shape[1], **vectors)
    operands = x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2
    chosen = choose("temporal_residual", BACKENDS, backend, *operands)
    if chosen == "reference":
        return reference.temporal_residual(*operands)
    operands = tuple(tensor.contiguous() for tensor in operands)
    if needs_gradient(*operands):
        return _TemporalResidual.apply(*operands, chosen)
    return BACKENDS[chosen].forward(*operands)


def _check_weights(x: Tensor, **weights: Tensor) -> None:
    for name, weight in weights.items():
        check_weight("temporal_residual", x, **{name: weight})
        if weight.shape[0] != x.shape[1] or weight.shape[2:] != KERNEL:
            raise ValueError(
                f"temporal_residual: {name} must be {(x.shape[1], x.shape[1], *KERNEL)}, "
                f"got {tuple(weight.shape)}"
            )


class _TemporalResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, backend):
        convolve = BACKENDS[backend].convolve
        hidden = convolve(x, weight1, bias1, scale1, shift1, None, PLAN)
        first, second = (
            (x, weight1, bias1, scale1, shift1),
            (hidden, weight2, bias2, scale2, shift2),
        )
        ctx.save_for_backward(*first, *second)
        ctx.backend = backend
        return convolve(*second, x, PLAN)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        first, second = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        pull_back, needs = BACKENDS[ctx.backend].convolve_backward, ctx.needs_input_grad
        # In the order of forward: of the first convolution needs[:5], of the second needs[5:9].
        wanted = Wanted(input=any(needs[:7]), weight=any(needs[7:9]))
        dhidden, dw2, db2, *dnorm2 = pull_back(dy.contiguous(), *second, PLAN, wanted)
        dx = dw1 = db1 = None
        dnorm1 = None, None
        if any(needs[:5]):
            wanted = Wanted(input=any(needs[:3]), weight=any(needs[3:5]))
            dx, dw1, db1, *dnorm1 = pull_back(dhidden, *first, PLAN, wanted)
        if needs[0]:
            dx.add_(dy)
        return dx, *dnorm1, dw1, db1, *dnorm2, dw2, db2, None
