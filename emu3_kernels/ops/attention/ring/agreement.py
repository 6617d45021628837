"""What the ranks exchange beside keys: their arguments before, and failures at any time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.ring.shards import Zigzag, check_sizes

FAILURE = "emu3_kernels.ring_attention: failure"


class Facts(NamedTuple):
    """What must be the same on all ranks, as numbers; zeros where the arguments are invalid."""

    batch: float = 0
    num_heads: float = 0
    num_kv_heads: float = 0
    head_dim: float = 0
    dtype: float = 0
    needs_gradient: float = 0
    causal: float = 0
    document_ids: float = 0
    scale: float = 0
    dropout_p: float = 0
    seed: float = 0
    num_heads_of_dropout: float = 0
    first_head_of_dropout: float = 0
    backend: float = 0


def agree(
    invalid: Exception | None, size: int, seed: Tensor, facts: Facts, group: dist.ProcessGroup
) -> tuple[Zigzag, Tensor]:
    """Compare the arguments of all ranks in one small message.

    Every rank raises if the arguments of one are invalid or if they differ, so that none waits for
    another in vain.

    Args:
        invalid: what this rank's own checks raised, or None.
        size: tokens of this rank.
        seed: 0-d int64; its device is that of the message.
        facts: of this rank.
        group: the ring.

    Returns:
        How the sequence is sharded, and the seed: that of rank 0, unless all are given one.
    """
    mine = torch.tensor([invalid is not None, size, *facts], dtype=torch.float64)
    mine = torch.cat([mine.view(torch.int64).to(seed.device), seed[None]])
    ranks = mine.new_empty(dist.get_world_size(group), len(mine))
    with waiting("to compare arguments", group):
        dist.all_gather(list(ranks.unbind()), mine, group=group)
    seeds = ranks[:, -1]
    numbers = ranks[:, :-1].cpu().view(torch.float64)
    if numbers[:, 0].any():
        _raise_invalid(invalid, group)
    columns = dict(zip(Facts._fields, numbers[:, 2:].T.tolist(), strict=True))
    if facts.seed:
        columns["seed"] = seeds.tolist()
    for name, values in columns.items():
        if len(set(values)) > 1:
            raise ValueError(f"ring_attention: all ranks must pass the same {name}, got {values}")
    return check_sizes("ring_attention", numbers[:, 1].long().tolist()), seeds[0].clone()


def _raise_invalid(invalid: Exception | None, group: dist.ProcessGroup) -> None:
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, invalid and str(invalid), group=group)
    if invalid:
        raise invalid
    rank, message = next((r, message) for r, message in enumerate(messages) if message)
    raise ValueError(f"{message} (on rank {rank})")


class LostRankError(RuntimeError):
    """Another rank failed, or did not answer within the timeout of the group."""


@contextmanager
def waiting(purpose: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Name this rank and the purpose if the group times out; quote the rank that failed."""
    try:
        yield
    except RuntimeError as error:
        store = group.get_group_store()
        cause = f"{store.get(FAILURE).decode()}; " if store.check([FAILURE]) else ""
        raise LostRankError(
            f"ring_attention: rank {dist.get_rank(group)} waited {purpose} in vain: {cause}{error}"
        ) from error


@contextmanager
def failing_together(group: dist.ProcessGroup) -> Iterator[None]:
    """Publish an exception to the ranks that wait for this one, which repeat its message."""
    try:
        yield
    except LostRankError:
        raise
    except Exception as error:
        message = f"rank {dist.get_rank(group)} failed with {type(error).__name__}: {error}"
        group.get_group_store().set(FAILURE, message)
        raise
