"""Causal convolution of a video with its norm, activations and residual; it can be streamed.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.conv3d.cache import FrameCache, extend, remember
from emu3_kernels.ops.conv3d.plan import (
    Operands,
    Plan,
    Wanted,
    check_residual,
    check_vectors,
    check_weight,
    check_x,
    out_shape,
)
from emu3_kernels.ops.conv3d.reference import convolve
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("causal_conv3d", "cpu", "triton")
ACTIVATIONS = (None, "silu")


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    post_activation: str | None = None,
    residual: Tensor | None = None,
    cache: FrameCache | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, FrameCache]:
    r"""Convolve in space and back in time: ``y = post(conv(pad(act(u))) + bias) + residual``.

    ``u = scale * x + shift``, and act and post are the identity or SiLU. The zeros of ``pad`` come
    after norm and activation: ``kt - stride_t`` frames ahead and none behind, so that a result sees
    no later frame (2 ahead for Emu3's kernels of 3 at stride 1 and of 4 at stride 2); in space,
    with ``p = k - stride`` of an axis, ``p//2 + p%2`` before and ``p//2`` after. The residual is
    added last, after ``post_activation``.

    Computed in float32 (float64 for float64 inputs) and rounded once, to the dtype of ``x``; Triton
    rounds what it multiplies to that dtype too, act(u) and the weights, for the tensor cores, as do
    processors that multiply bfloat16, act(u) where ``x`` and the weights are bfloat16.
    Differentiable in all tensors; the backward pass recomputes norm and activations, so only the
    inputs are kept.

    With a ``cache``, ``x`` is the next piece of a video and the cache of the next call is returned
    too; the given one is left as it is. The results of the pieces, of any lengths, are those of the
    video at once, bit for bit on every backend but the reference. A piece that completes no result
    gives ``T' = 0``. There is no gradient through a cache.

    From Emu3's vision tokenizer, ``Emu3VisionVQCausalConv3d`` (arXiv 2409.18869).

    Args:
        x: ``[B, C, T, H, W]``, any floating dtype, any strides (copied if not contiguous).
        weight: ``[O, C, kt, kh, kw]``, floating, as are the vectors, in any dtype.
        bias: ``[O]`` or None.
        stride: of time, rows and columns, each from 1 to the size of the kernel.
        scale: ``[C]``, the factor of a folded norm; None, with ``shift``, is no norm.
        shift: ``[C]``, the term of a folded norm.
        activation: ``"silu"`` after the norm and before the convolution, or None.
        post_activation: ``"silu"`` after the bias, or None.
        residual: ``[B, O, T', H', W']`` in the dtype of ``x``, added last, or None.
        cache: ``FrameCache()`` at the start of a video, then what the call before has returned.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[B, O, T', H', W']`` in the dtype of ``x``, each size the input's ``// stride``; with a
        ``cache``, that and the next cache, and T' is what the frames so far complete.
    """
    _check(x, weight, bias, scale, shift, stride)
    settings = {"activation": activation, "post_activation": post_activation}
    for name, value in settings.items():
        if value not in ACTIVATIONS:
            raise ValueError(f"causal_conv3d: {name} must be None or 'silu', got {value!r}")
    kernel, front = weight.shape[2], weight.shape[2] - stride[0]
    if cache is not None:
        if needs_gradient(*(t for t in (x, weight, bias, scale, shift, residual) if t is not None)):
            raise ValueError(
                "causal_conv3d: has no gradient through a cache, got inputs that require one"
            )
        x, front = extend(cache, x, kernel, stride[0])
    plan = Plan(tuple(stride), front, activation == "silu", post_activation == "silu")
    check_residual("causal_conv3d", x, out_shape(x, weight, plan), residual)
    y = _run(Operands(x, weight, bias, scale, shift, residual), plan, backend)
    return y if cache is None else (y, remember(x, kernel, plan))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int, int],
) -> None:
    check_x("causal_conv3d", x)
    check_weight("causal_conv3d", x, weight=weight)
    check_vectors("causal_conv3d", x, weight.shape[0], bias=bias)
    check_vectors("causal_conv3d", x, x.shape[1], scale=scale, shift=shift)
    if (scale is None) != (shift is None):
        given = "shift" if scale is None else "scale"
        raise ValueError(f"causal_conv3d: scale and shift must come together, got {given} alone")
    kernel = tuple(weight.shape[2:])
    if len(stride) != 3 or not all(1 <= s <= k for s, k in zip(stride, kernel, strict=True)):
        raise ValueError(
            f"causal_conv3d: stride must be three integers from 1 to those of the kernel {kernel}, "
            f"got {stride}"
        )


def _run(operands: Operands, plan: Plan, backend: str | None) -> Tensor:
    chosen = choose("causal_conv3d", BACKENDS, backend, *operands, plan)
    if chosen == "reference":
        return convolve(*operands, plan)
    operands = Operands(*(None if tensor is None else tensor.contiguous() for tensor in operands))
    if needs_gradient(*(tensor for tensor in operands if tensor is not None)):
        return _CausalConv3d.apply(*operands, plan, chosen)
    return BACKENDS[chosen].forward(*operands, plan)


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, residual, plan, backend):
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.plan, ctx.backend, ctx.has_residual = plan, backend, residual is not None
        return BACKENDS[backend].forward(x, weight, bias, scale, shift, residual, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, scale, shift, *_ = ctx.needs_input_grad
        wanted = Wanted(input=x or scale or shift, weight=weight or bias)
        backward = BACKENDS[ctx.backend].backward
        grads = backward(dy.contiguous(), *ctx.saved_tensors, ctx.plan, wanted)
        return *grads, dy if ctx.has_residual else None, None, None
