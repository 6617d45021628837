"""Causal convolutions of a video with their norms, activations and residuals; they can be streamed.

B batch, C channels in, O channels out, T frames, H rows, W columns.

Backends of ``causal_conv3d`` have ``forward(*Inputs, plan)`` and ``backward(dy, x, weight, bias,
scale, shift, plan, needs)``, which returns a gradient or None for each of the five tensors; a
``function`` takes the arguments of the reference. Those of ``temporal_residual`` have
``forward(*tensors, keep_hidden)``, which returns y and the hidden video or None, and ``backward(dy,
hidden, needs, *tensors)``, which returns a gradient or None for each of the nine tensors.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.conv3d import reference
from emu3_kernels.ops.conv3d.cache import FrameCache, extend, remember
from emu3_kernels.ops.conv3d.plan import (
    Inputs,
    Needs,
    Plan,
    check_residual,
    check_vectors,
    check_weight,
    check_x,
    out_shape,
)
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.dispatch import Backends

CAUSAL_CONV3D = Backends(
    "causal_conv3d",
    __package__,
    reference.causal_conv3d,
    cpu=("cpu",),
    cuda=("cuda", "aten", "triton"),
)
TEMPORAL_RESIDUAL = Backends(
    "temporal_residual",
    __package__,
    reference.temporal_residual,
    cpu=("cpu",),
    cuda=("cuda", "aten", "triton"),
)
ACTIVATIONS = (None, "silu")
BLOCK_KERNEL = (3, 3, 3)


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
    after norm and activation: ``kt - stride_t`` frames ahead and none behind, so that an output
    depends on no later frame (2 ahead for Emu3's kernels of 3 at stride 1 and of 4 at stride 2); in
    space, with ``p = k - stride`` of an axis, ``p//2 + p%2`` before and ``p//2`` after. The
    residual is added last, after ``post_activation``.

    Computed in float32 (float64 for float64 inputs) and rounded once, to the dtype of ``x``. Triton
    rounds the operands of its GEMM, act(u) and the weights, to that dtype too, for the tensor
    cores. So does ``aten``, cuDNN's convolution, which rounds a second time before bias,
    ``post_activation`` and residual: it runs 16-bit convolutions of 64 channels and more on a GPU,
    without a cache. Processors with a bfloat16 dot product round act(u) where ``x`` and the weights
    are bfloat16. Differentiable in all tensors; the backward pass recomputes norm and activations,
    so only the inputs are kept, and by ``aten`` with a ``post_activation`` what it is applied to.

    With a ``cache``, ``x`` is the next piece of a video and the cache of the next call is returned
    too; the given one is not changed. The outputs of the pieces, of any lengths, are those of the
    video at once, bit for bit on every backend but the reference. A piece that completes no output
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
        cache: ``FrameCache()`` at the start of a video, then what the last call returned.
        backend: a key of ``CAUSAL_CONV3D``, or None for the first that fits.

    Returns:
        ``[B, O, T', H', W']`` in the dtype of ``x``, each size the input's ``// stride``; with a
        ``cache``, that and the next cache, and T' is the number of outputs that ``x`` completes.
    """
    _check(x, weight, bias, scale, shift, stride)
    activations = {"activation": activation, "post_activation": post_activation}
    for name, value in activations.items():
        if value not in ACTIVATIONS:
            raise ValueError(f"causal_conv3d: {name} must be None or 'silu', got {value!r}")
    kernel, front = weight.shape[2], weight.shape[2] - stride[0]
    if cache is not None:
        if needs_gradient(*(t for t in (x, weight, bias, scale, shift, residual) if t is not None)):
            raise ValueError(
                "causal_conv3d: has no gradient through a cache, got inputs that require one"
            )
        x, front = extend(cache, x, kernel, stride[0])
    silu, post_silu = activation == "silu", post_activation == "silu"
    plan = Plan(tuple(stride), front, silu, post_silu, is_piece=cache is not None)
    check_residual("causal_conv3d", x, out_shape(x, weight, plan), residual)
    y = _run(Inputs(x, weight, bias, scale, shift, residual), plan, backend)
    return y if cache is None else (y, remember(x, kernel, plan))


def _run(inputs: Inputs, plan: Plan, backend: str | None) -> Tensor:
    chosen = CAUSAL_CONV3D.choose(backend, *inputs, plan)
    if chosen.function is not None:
        return chosen.function(
            **inputs._asdict(),
            stride=plan.stride,
            activation="silu" if plan.silu else None,
            post_activation="silu" if plan.post_silu else None,
            front=plan.front,
        )
    inputs = Inputs(*(None if tensor is None else tensor.contiguous() for tensor in inputs))
    if needs_gradient(*(tensor for tensor in inputs if tensor is not None)):
        return _CausalConv3d.apply(*inputs, plan, chosen)
    return chosen.forward(*inputs, plan)


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, residual, plan, backend):
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.plan, ctx.backend, ctx.has_residual = plan, backend, residual is not None
        return backend.forward(x, weight, bias, scale, shift, residual, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, scale, shift, *_ = ctx.needs_input_grad
        needs = Needs(input=x or scale or shift, weight=weight or bias)
        grads = ctx.backend.backward(dy.contiguous(), *ctx.saved_tensors, ctx.plan, needs)
        return *grads, dy if ctx.has_residual else None, None, None


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
    both convolutions are :func:`causal_conv3d` with a kernel of 3 x 3 x 3, a bias and stride 1.
    Without a gradient, the ``cpu`` backend takes one pass over ``x``: ``hidden`` stays in caches.
    On a GPU it stays in the level-2 cache, between two launches that fill the multiprocessors; of
    64 channels and more in 16 bits, both convolutions are cuDNN's (``aten``).

    Computed in float32 (float64 for float64 inputs; see :func:`causal_conv3d` for bfloat16);
    ``hidden`` and ``y`` are each rounded once, to the dtype of ``x``, so that the result
    equals, bit for bit on every backend but the reference, two calls of :func:`causal_conv3d`, the
    second with ``residual=x``. Those can be streamed. Differentiable in all tensors, in two passes
    that keep ``x`` and ``hidden``.

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
        backend: a key of ``TEMPORAL_RESIDUAL``, or None for the first that fits.

    Returns:
        ``[B, C, T, H, W]`` in the dtype of ``x``.
    """
    check_x("temporal_residual", x)
    _check_weights(x, weight1=weight1, weight2=weight2)
    vectors = {"scale1": scale1, "shift1": shift1, "bias1": bias1}
    vectors |= {"scale2": scale2, "shift2": shift2, "bias2": bias2}
    check_vectors("temporal_residual", x, x.shape[1], **vectors)
    tensors = x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2
    chosen = TEMPORAL_RESIDUAL.choose(backend, *tensors)
    if chosen.function is not None:
        return chosen.function(*tensors)
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    if needs_gradient(*tensors):
        return _TemporalResidual.apply(*tensors, chosen)
    y, _ = chosen.forward(*tensors, keep_hidden=False)
    return y


class _TemporalResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, backend):
        tensors = x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2
        y, hidden = backend.forward(*tensors, keep_hidden=True)
        ctx.save_for_backward(hidden, *tensors)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        hidden, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(tensors)]
        grads = ctx.backend.backward(dy.contiguous(), hidden, needs, *tensors)
        return *grads, None


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


def _check_weights(x: Tensor, **weights: Tensor) -> None:
    check_weight("temporal_residual", x, **weights)
    shape = (x.shape[1], x.shape[1], *BLOCK_KERNEL)
    for name, weight in weights.items():
        if weight.shape != shape:
            raise ValueError(
                f"temporal_residual: {name} must be {shape}, got {tuple(weight.shape)}"
            )
