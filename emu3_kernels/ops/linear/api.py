"""A linear layer, fast in bfloat16 where PyTorch's is not.

T tokens, D channels in, O channels out.
"""

from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.linear import reference
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import choose, load
from emu3_kernels.runtime.gemm import SLOW_IN_BFLOAT16, autocast

BACKENDS = load("linear", *(("cpu", "aten") if SLOW_IN_BFLOAT16 else ("aten", "cpu")))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    r"""Return ``y = x weight^T + bias``, as ``torch.nn.functional.linear`` does.

    PyTorch has oneDNN or cuBLAS multiply bfloat16, as fast as the processor can: that is the
    ``aten`` backend. Without AVX-512 it takes ten to thirty times as long as in float32, and on x86
    ``native`` comes first there: it widens each block of x and weight while the block is in the
    cache, sums in float32 and rounds once; up to 16 rows of x meet the weights where they lie.
    Differentiable in all tensors. ``torch.autocast`` has its way with it, as with PyTorch's.

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[O, D]`` in the dtype and on the device of ``x``.
        bias: ``[O]`` likewise, or None.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``[..., O]`` in the dtype of ``x``.
    """
    x, weight, bias = autocast(x), autocast(weight), None if bias is None else autocast(bias)
    _check(x, weight, bias)
    chosen = choose("linear", BACKENDS, backend, x)
    if chosen == "reference":
        return reference.linear(x, weight, bias)
    if chosen == "aten":
        return BACKENDS[chosen].forward(x, weight, bias)
    tokens = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    if needs_gradient(x, weight, *(() if bias is None else (bias,))):
        y = _Linear.apply(tokens, weight, bias, chosen)
    else:
        y = BACKENDS[chosen].forward(tokens, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("linear", x=x)
    if x.dim() == 0:
        raise ValueError(f"linear: x must be [..., D], got {describe(x)}")
    if weight.dim() != 2:
        raise ValueError(f"linear: weight must be [O, D], got {describe(weight)}")
    shapes = {"weight": (weight, (len(weight), x.shape[-1]))}
    if bias is not None:
        shapes["bias"] = bias, (len(weight),)
    for name, (tensor, shape) in shapes.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, x.dtype, x.device):
            raise ValueError(
                f"linear: {name} must be {tuple(shape)} {x.dtype} {x.device} as x is "
                f"{tuple(x.shape)}, got {describe(tensor)}"
            )


class _Linear(torch.autograd.Function):
    """On rows ``[T, D]``."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return BACKENDS[backend].forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[:3]
        return *BACKENDS[ctx.backend].backward(dy, *ctx.saved_tensors, wanted), None
