"""A head that a process group shares: rank r holds the classes after those of rank r - 1."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """The classes of this rank; without a group, all of them."""

    first: int
    num_classes: int
    """Of the whole group."""
    largest: int
    """The classes of the largest shard: how work is cut must not depend on the rank."""
    group: str
    """The name of the group, ``""`` for none: an op takes no object."""


def shard_of(
    hidden: Tensor, head: Tensor, targets: Tensor, memory: int, group: dist.ProcessGroup | None
) -> Shard:
    """Gather the sizes of all shards, and raise unless the ranks make the same call."""
    if group is None:
        return Shard(0, head.shape[0], head.shape[0], "")
    alike = {
        "width": hidden.shape[-1],
        "number of tokens": targets.numel(),
        "bytes per element": hidden.element_size(),
        "memory": memory,
        "gradient of hidden": hidden.requires_grad,
        "gradient of head": head.requires_grad,
    }
    mine = torch.tensor([head.shape[0], *alike.values()], device=targets.device)
    mine = torch.cat([mine, targets.sum()[None]])
    ranks = gathered(mine, group).tolist()
    sizes = [rank[0] for rank in ranks]
    for i, name in enumerate([*alike, "sum of targets"], start=1):
        if len({rank[i] for rank in ranks}) > 1:
            raise ValueError(
                "linear_cross_entropy: all ranks of group must be called alike, got "
                f"{name} {', '.join(str(rank[i]) for rank in ranks)}"
            )
    before = sum(sizes[: group.rank()])
    return Shard(before, sum(sizes), max(sizes), group.group_name)


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the parts of all ranks, in their order."""
    parts = part.new_empty(group.size(), *part.shape)
    dist.all_gather(list(parts.unbind()), part, group=group)
    return parts


def no_sums(hidden: Tensor) -> Tensor:
    """Return the sums ``[N, 4]`` over no class; the largest logit is finite, to leave no NaN."""
    sums = hidden.new_zeros(hidden.shape[0], 4, dtype=torch.float64)
    sums[:, 0] = torch.finfo(torch.float32).min
    return sums


def merged(sums: Tensor, shard: Shard) -> Tensor:
    """Merge the sums ``[N, 4]`` of the classes of every rank, in the order of the ranks."""
    if not shard.group:
        return sums
    parts = gathered(sums, _named(shard.group))
    highest = parts[..., 0].amax(0)
    total_exp = (parts[..., 1] * (parts[..., 0] - highest).exp()).sum(0)
    return torch.stack([highest, total_exp, *parts[..., 2:].sum(0).unbind(1)], dim=1)


def summed(part: Tensor, shard: Shard) -> Tensor:
    """Add up the parts of all ranks in float32 at the least, and round the sum once."""
    if not shard.group:
        return part
    total = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=_named(shard.group))
    return total.to(part.dtype)


def largest_of(part: Tensor, shard: Shard) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, dist.ReduceOp.MAX, group=_named(shard.group))
    return total


def _named(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)
