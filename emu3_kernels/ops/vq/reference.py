"""The definition of nearest_code in plain PyTorch."""

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Distances held at a time: 16 MiB in float32."""


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    compute = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    codes = codebook.to(compute)
    queries = z.to(compute).movedim(1, -1)
    rows = queries.reshape(queries.shape[:-1].numel(), z.shape[1])
    nearest = [_nearest(chunk, codes) for chunk in rows.split(max(1, CHUNK // len(codes)))]
    return torch.cat(nearest).view(queries.shape[:-1])


def _nearest(queries: Tensor, codes: Tensor) -> Tensor:
    distance = torch.zeros(len(queries), len(codes), dtype=codes.dtype, device=codes.device)
    for d in range(codes.shape[1]):
        difference = queries[:, d, None] - codes[:, d]
        distance = distance + difference * difference
    return distance.where(~distance.isnan(), torch.inf).argmin(1)
