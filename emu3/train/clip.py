"""The norm of a gradient over all ranks, and its limit."""

import math
from collections.abc import Set

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from emu3.model import Emu3
from emu3.train.layout import Layout
from emu3.train.parallel import cuts_of


@torch.no_grad()
def clip_gradients(model: Emu3, layout: Layout, most: float) -> Tensor:
    """Clip by the norm over all meshes and return it, the same bits on every rank.

    Call it once a step, also without a limit (``most=inf``): gradients of which each rank has a
    part are added up here. Those are of norms, which each tensor rank has of its tokens, and of
    adapters, which each rank has of its rows and tokens.
    """
    s, gradients = layout.settings, {}
    for name, cut in cuts_of(model).items():
        gradient = model.get_parameter(name).grad
        if gradient is not None:
            holders = {"tensor"} if cut.tensor is None else set()
            if cut.fsdp is None:
                holders |= {"replicate", "fsdp"}
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            gradients.setdefault(frozenset(holders), []).append(local)
    square = 0.0
    for holders, mine in gradients.items():
        _add_up(mine, layout, holders)
        copies = math.prod(layout.storage[name].size() for name in holders - {"replicate"})
        square = square + _square(mine) / copies
    dist.all_reduce(square)
    norm = (square / s.replicate).sqrt().float()
    every = [gradient for mine in gradients.values() for gradient in mine]
    torch._foreach_mul_(every, (most / (norm + 1e-6)).clamp(max=1))
    return norm


def _add_up(gradients: list[Tensor], layout: Layout, holders: Set[str]) -> None:
    """Add up, in place, what the ranks of ``holders`` have a part of each."""
    groups = [n for n in layout.storage.mesh_dim_names if n in holders]
    groups = [layout.storage.get_group(n) for n in groups if layout.storage[n].size() > 1]
    if not groups:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    for group in groups:
        dist.all_reduce(flat, group=group)
    for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))


def _square(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum()
