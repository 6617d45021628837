"""A head that a process group shares: rank r holds the classes after those of rank r - 1."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """The classes of this rank; without a group, all of them."""

    first: int
    num_classes: int
    """Of the whole group."""
    largest: int
    """Classes of the largest shard: the chunks must be the same on every rank."""
    group: str
    """The name of the group, ``""`` for none: a custom op takes no object."""


def shard_of(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    memory: int | None,
    group: dist.ProcessGroup | None,
) -> VocabShard:
    """Gather the sizes of all shards, and raise unless the ranks make the same call."""
    if group is None:
        return VocabShard(0, head.shape[0], head.shape[0], "")
    alike = {
        "width": hidden.shape[-1],
        "number of tokens": targets.numel(),
        "bytes per element": hidden.element_size(),
        "memory": -1 if memory is None else memory,
        "gradient of hidden": hidden.requires_grad,
        "gradient of head": head.requires_grad,
    }
    mine = torch.tensor([head.shape[0], *alike.values()], device=targets.device)
    mine = torch.cat([mine, targets.sum()[None]])
    ranks = all_gather(mine, group).tolist()
    sizes = [rank[0] for rank in ranks]
    for i, name in enumerate([*alike, "sum of targets"], start=1):
        if len({rank[i] for rank in ranks}) > 1:
            raise ValueError(
                "linear_cross_entropy: all ranks of group must be called alike, got "
                f"{name} {', '.join(str(rank[i]) for rank in ranks)}"
            )
    before = sum(sizes[: group.rank()])
    return VocabShard(before, sum(sizes), max(sizes), group.group_name)


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the parts of all ranks, in their order."""
    parts = part.new_empty(group.size(), *part.shape)
    dist.all_gather(list(parts.unbind()), part, group=group)
    return parts


def initial_state(hidden: Tensor) -> Tensor:
    """Return the softmax state ``[N, 4]`` of no class; m is finite, since it must leave no NaN."""
    state = hidden.new_zeros(hidden.shape[0], 4, dtype=torch.float64)
    state[:, 0] = torch.finfo(torch.float32).min
    return state


def merge_states(state: Tensor, shard: VocabShard) -> Tensor:
    """Merge the softmax states ``[N, 4]`` of all ranks, in their order."""
    if not shard.group:
        return state
    parts = all_gather(state, _process_group(shard.group))
    m_i = parts[..., 0].amax(0)
    l_i = (parts[..., 1] * (parts[..., 0] - m_i).exp()).sum(0)
    return torch.stack([m_i, l_i, *parts[..., 2:].sum(0).unbind(1)], dim=1)


def all_reduce_sum(part: Tensor, shard: VocabShard) -> Tensor:
    """Add up the parts of all ranks in float32 at the least, and round the sum once."""
    if not shard.group:
        return part
    total = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=_process_group(shard.group))
    return total.to(part.dtype)


def all_reduce_max(part: Tensor, shard: VocabShard) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, dist.ReduceOp.MAX, group=_process_group(shard.group))
    return total


def _process_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
