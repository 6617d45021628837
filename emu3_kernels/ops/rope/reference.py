"""The definition of rope in plain PyTorch."""

import torch
from torch import Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    cos, sin = cos[positions][..., None, :], sin[positions][..., None, :]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(compute).chunk(2, dim=-1)
    cos, sin = cos.to(compute), sin.to(compute)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
