"""The definition of rope_append in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.ops.rope.rotation import rotate


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    if positions is None:
        positions = slots
    row = torch.arange(len(slots), device=slots.device)[:, None]
    key_cache[row, slots] = rotate(k, cos, sin, positions)
    value_cache[row, slots] = v
    return rotate(q, cos, sin, positions)
