"""The definitions of rope and rope_append in plain PyTorch."""

import torch
from torch import Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    return _rotate(q, cos, sin, positions), _rotate(k, cos, sin, positions)


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
    key_cache[row, slots] = _rotate(k, cos, sin, positions)
    value_cache[row, slots] = v
    return _rotate(q, cos, sin, positions)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``x [B, T, H, K]`` by the table rows at ``positions``, ``[B, T]`` or ``[T]``."""
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][..., None, :].to(compute) for table in (cos, sin))
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
