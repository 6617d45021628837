"""Products of PyTorch, and what takes their place where it is slow in bfloat16.

Without AVX-512 PyTorch multiplies bfloat16 at a tenth of the rate of float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.checks import rows

_HAS_NARROW = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
SLOW_IN_BFLOAT16 = "avx2" in library.cpu_levels() and not _HAS_NARROW
"""Whether bfloat16 products on this CPU are csrc/cpu/matmul.cpp's, in float32 and rounded once."""


def is_slow(x: Tensor) -> bool:
    """Say whether PyTorch is slow to multiply ``x``."""
    return SLOW_IN_BFLOAT16 and x.dtype == torch.bfloat16 and x.is_cpu


def autocast(x: Tensor) -> Tensor:
    """Cast an operand as ``torch.autocast`` casts that of a product, where it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def mm_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """Write ``a @ b`` into ``out``, or add it; ``out`` may be wider."""
    if is_slow(a):
        torch.ops.emu3_kernels.matmul_into(_in_lines(a), _in_lines(b), out if add else None, out)
    elif not add and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif add and out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    return out


def matmul(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return ``a @ b + plus`` of bfloat16 matrices by csrc/cpu/matmul.cpp, ``plus [1 or M, N]``."""
    plus = None if plus is None else rows(plus)
    return torch.ops.emu3_kernels.matmul(_in_lines(a), _in_lines(b), plus)


def _in_lines(x: Tensor) -> Tensor:
    """Return ``x`` with its rows or its columns in one piece each."""
    return x if 1 in x.stride() else x.contiguous()


def widened(
    function: Callable[..., Tensor], x: Tensor, *weights: Tensor | None, **settings
) -> Tensor:
    """Call a product of PyTorch, in float32 where it is slow in the dtype of ``x``.

    Args:
        function: takes ``x``, ``weights`` and ``settings``, such as ``F.conv2d``.
        x: any floating dtype.
        weights: in the dtype of ``x``, or None.
        settings: named arguments.

    Returns:
        What ``function`` does, in the dtype of ``x``.
    """
    if not is_slow(x):
        return function(x, *weights, **settings)
    wide = (w if w is None else w.float() for w in (x, *weights))
    return function(*wide, **settings).to(x.dtype)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::matmul")
    def _(a: Tensor, b: Tensor, plus: Tensor | None) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]))

    @torch.library.register_fake("emu3_kernels::matmul_into")
    def _(a: Tensor, b: Tensor, plus: Tensor | None, c: Tensor) -> None:
        pass
