"""The definition of rope in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.ops.rope.rotation import rotate


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    return rotate(q, cos, sin, positions), rotate(k, cos, sin, positions)
