"""GEMMs of PyTorch, and what replaces them on a CPU where they are slow in bfloat16.

Without AVX-512 the bfloat16 GEMMs of PyTorch run at a tenth of the rate of float32.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import rows

_HAS_BFLOAT16 = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
SLOW_IN_BFLOAT16 = "avx2" in library.cpu_levels() and not _HAS_BFLOAT16
"""Whether this CPU is slow in bfloat16, and csrc/cpu/gemm/matmul.cpp can take over."""


def is_slow(x: Tensor) -> bool:
    """Return whether a GEMM of PyTorch is slow in the dtype and on the device of ``x``."""
    return SLOW_IN_BFLOAT16 and x.dtype == torch.bfloat16 and x.is_cpu


def autocast(x: Tensor) -> Tensor:
    """Cast an operand of a GEMM as ``torch.autocast`` does, where that is enabled."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def mm_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """Write ``a @ b`` into ``out``, or add it to ``out``, which may be of a wider dtype.

    On an NVIDIA GPU a wider ``out`` takes float32 sums, which are never rounded to the dtype of
    ``a``.
    """
    if is_slow(a):
        torch.ops.emu3_kernels.matmul_into(
            _unit_stride(a), _unit_stride(b), out if add else None, out
        )
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and torch.version.hip is None:
        wider = {"out_dtype": out.dtype, "out": out}
        torch.addmm(out, a, b, **wider) if add else torch.mm(a, b, **wider)
    else:
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    return out


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b + bias`` of bfloat16 matrices: csrc/cpu/gemm/matmul.cpp.

    Blocks of both operands are converted to float32 in the cache; the sums are float32 and rounded
    once. Up to 16 rows of ``a`` skip the packing of ``b``.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``.
        bias: ``[N]`` of any stride, or None.
    """
    bias = None if bias is None else rows(bias.unsqueeze(0))
    return torch.ops.emu3_kernels.matmul(_unit_stride(a), _unit_stride(b), bias)


def _unit_stride(x: Tensor) -> Tensor:
    """Return ``x`` with unit stride in one of its two dimensions."""
    return x if 1 in x.stride() else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.linear``, by :func:`matmul` where PyTorch is slow.

    On a GPU, an odd number of outputs is computed in rows of whole 16 bytes, of which the result is
    a view. Differentiable in all tensors, and subject to ``torch.autocast``, as PyTorch's is.
    """
    x, weight, bias = autocast(x), autocast(weight), None if bias is None else autocast(bias)
    if is_ragged(x, weight) and bias is None:
        function, forward = _RaggedLinear, ragged_linear
    elif is_slow(x):
        function, forward = _Linear, _matmul_of_linear
    else:
        return F.linear(x, weight, bias)
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)  # which raises
    tokens = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    if needs_gradient(x, weight, *(() if bias is None else (bias,))):
        y = function.apply(tokens, weight, bias)
    else:
        y = forward(tokens, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _matmul_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return matmul(x, weight.t(), bias)


GEMM_ALIGN, GEMM_COLUMNS = 8, 128
"""cuBLAS needs contiguous extents that are multiples of the first; its widest tile is the second.

With V = 184,622 outputs a GEMM of 8,192 tokens ran at 287 TFLOP/s, with aligned ones at 811
(measured on an H200).
"""


def is_ragged(x: Tensor, weight: Tensor) -> bool:
    """Return whether PyTorch's GEMM on a GPU is slow since ``weight [N, K]`` has an odd N.

    Inductor pads such GEMMs by itself.
    """
    ragged = x.is_cuda and len(weight) % GEMM_ALIGN != 0 and len(weight) > GEMM_COLUMNS
    return ragged and not torch.compiler.is_compiling()


def ragged_linear(x: Tensor, weight: Tensor, _: None = None) -> Tensor:
    """Return ``x @ weight.T``, a view of rows of whole 16 bytes, by GEMMs of aligned columns."""
    y = _aligned_rows(x, len(weight))
    for columns in _aligned_parts(len(weight)):
        mm_(y[:, columns], x, weight[columns].t())
    return y


def _aligned_parts(num_columns: int) -> tuple[slice, slice]:
    """Split columns into whole tiles, and the fewer than one after them."""
    split = num_columns // GEMM_COLUMNS * GEMM_COLUMNS
    return slice(0, split), slice(split, num_columns)


def _aligned_rows(like: Tensor, num_columns: int) -> Tensor:
    padded = -(-num_columns // GEMM_ALIGN) * GEMM_ALIGN
    return like.new_empty(like.shape[0], padded)[:, :num_columns]


class _RaggedLinear(torch.autograd.Function):
    """On tokens ``[M, K]``, with ``weight [N, K]`` of an N that is no multiple of 8."""

    @staticmethod
    def forward(ctx, x, weight, _):
        ctx.save_for_backward(x, weight)
        return ragged_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        if dy.stride(1) != 1 or dy.stride(0) % GEMM_ALIGN:
            dy = _aligned_rows(dy, dy.shape[1]).copy_(dy)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
        for columns in _aligned_parts(dy.shape[1]):
            if dx is not None:
                mm_(dx, dy[:, columns], weight[columns], add=True)
            if dweight is not None:
                mm_(dweight[columns], dy[:, columns].t(), x)
        return None if dx is None else dx.to(x.dtype), dweight, None


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether csrc/cpu/gemm/matmul.cpp, which checks nothing, can take these tensors."""
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    alike = (weight, *(() if bias is None else (bias,)))
    if any((tensor.dtype, tensor.device) != (x.dtype, x.device) for tensor in alike):
        return False
    return bias is None or bias.shape == weight.shape[:1]


class _Linear(torch.autograd.Function):
    """On tokens ``[M, K]``, with ``weight [N, K]``."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = matmul(dy, weight) if ctx.needs_input_grad[0] else None
        dweight = matmul(dy.t(), x) if ctx.needs_input_grad[1] else None
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype)
        return dx, dweight, dbias


def in_float32_if_slow(
    function: Callable[..., Tensor], x: Tensor, *weights: Tensor | None, **settings
) -> Tensor:
    """Call a GEMM or convolution of PyTorch, in float32 where it is slow in the dtype of ``x``.

    Args:
        function: takes ``x``, ``weights`` and ``settings``, such as ``F.conv2d``.
        x: any floating dtype.
        weights: in the dtype of ``x``, or None.
        settings: keyword arguments.

    Returns:
        The result of ``function``, rounded once to the dtype of ``x``.
    """
    if not is_slow(x):
        return function(x, *weights, **settings)
    operands = (w if w is None else w.float() for w in (x, *weights))
    return function(*operands, **settings).to(x.dtype)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::matmul")
    def _(a: Tensor, b: Tensor, plus: Tensor | None) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]))

    @torch.library.register_fake("emu3_kernels::matmul_into")
    def _(a: Tensor, b: Tensor, plus: Tensor | None, c: Tensor) -> None:
        pass
