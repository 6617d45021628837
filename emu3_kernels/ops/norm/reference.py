"""The definitions of rms_norm and add_rms_norm in plain PyTorch."""

from math import prod

import torch
from torch import Tensor

from emu3_kernels.runtime.dropout import keep, keep_scale


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    x_float = x.to(compute)
    rstd = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return (x_float * rstd * weight.to(compute)).to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    branch = x if seed is None else _dropout(x.to(compute), dropout_p, seed, dropout_rows)
    summed = (branch + residual).to(x.dtype)
    return rms_norm(summed, weight, eps), summed


def _dropout(x: Tensor, p: float, seed: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        rows = torch.arange(prod(x.shape[:-1]), device=x.device).view(x.shape[:-1])
    kept = keep(seed, p, rows[..., None], torch.arange(x.shape[-1], device=x.device))
    return torch.where(kept, x * keep_scale(p), 0)
