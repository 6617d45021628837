"""The gradients of conv3x3 by PyTorch's own convolutions, on channels-last ``[B, H, W, C]``."""

import torch
from torch import Tensor

from emu3_kernels.runtime.gemm import is_slow


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, None for what is not ``needed``."""
    compute = torch.float32 if is_slow(x) else x.dtype
    operands = (t.movedim(-1, 1).to(compute) for t in (dy, x, weight))
    gradients = torch.ops.aten.convolution_backward(
        *operands, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed
    )
    dx, dweight, dbias = (None if g is None else g.to(x.dtype) for g in gradients)
    dx, dweight = (None if g is None else g.movedim(1, -1) for g in (dx, dweight))
    return dx, dweight, dbias
