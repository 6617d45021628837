"""Zigzag shards of a sequence: rank r of P holds the chunks r and 2P-1-r of 2P."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | tuple[int, int]
"""A process group, or the (rank, world size) in it."""


class Zigzag(NamedTuple):
    """How ``num_tokens`` are sharded over ``world`` ranks; a causal mask leaves all the same work.

    Chunks differ by one token at most, so any number of tokens can be sharded.
    """

    num_tokens: int
    world: int

    def chunk(self, c: int) -> range:
        """Return the positions of a chunk."""
        chunks = 2 * self.world
        return range(c * self.num_tokens // chunks, (c + 1) * self.num_tokens // chunks)

    def chunks_of(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.world - 1 - rank

    def size(self, rank: int) -> int:
        return sum(len(self.chunk(c)) for c in self.chunks_of(rank))

    def local(self, c: int, positions: range) -> range:
        """Return the indices in its shard of a range of a chunk."""
        before = 0 if c < self.world else len(self.chunk(2 * self.world - 1 - c))
        shift = before - self.chunk(c).start
        return range(positions.start + shift, positions.stop + shift)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the ascending positions of a shard, int32."""
        parts = (self.chunk(c) for c in self.chunks_of(rank))
        on = {"dtype": torch.int32, "device": device}
        return torch.cat([torch.arange(part.start, part.stop, **on) for part in parts])


def shard_sequence(tensor: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Return this rank's zigzag shard of a whole sequence, as :func:`ring_attention` takes it.

    For whatever has one entry a token: ids, positions, labels, weights, documents. Chunks r and
    2P-1-r of 2P, in that order; any number of tokens can be sharded, chunks then differ by one.
    Differentiable, without communication.

    Args:
        tensor: the same on every rank, of any dtype.
        group: the process group, or a (rank, world size).
        dim: dimension of the tokens.

    Returns:
        A new tensor, with the shard's tokens along ``dim``.
    """
    rank, world = _rank_and_world(group)
    zigzag = Zigzag(tensor.shape[dim], world)
    parts = (zigzag.chunk(c) for c in zigzag.chunks_of(rank))
    return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in parts], dim)


def unshard_sequence(shard: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """Gather a whole sequence from the shards of all ranks: inverse of :func:`shard_sequence`.

    Differentiable: the gradient of a shard is that of the sum of all ranks' losses, so a loss
    that every rank computes alike from the whole must be divided by their number.

    Args:
        shard: of the same shape on all ranks except in ``dim``.
        group: the process group; every rank must call.
        dim: dimension of the tokens.

    Returns:
        The whole sequence, the same on every rank.
    """
    rows = shard.movedim(dim, 0)
    mine = torch.tensor([len(rows)], device=shard.device)
    lengths = mine.new_empty(dist.get_world_size(group))
    dist.all_gather(list(lengths.split(1)), mine, group=group)
    zigzag = check_sizes("unshard_sequence", lengths.tolist())
    return _Gather.apply(rows, zigzag, group).movedim(0, dim)


def check_sizes(op: str, sizes: list[int]) -> Zigzag:
    """Raise unless the numbers of tokens on the ranks are those of the shards of one sequence."""
    zigzag = Zigzag(sum(sizes), len(sizes))
    expected = [zigzag.size(rank) for rank in range(len(sizes))]
    if sizes != expected:
        raise ValueError(
            f"{op}: the ranks must hold the zigzag shards of one sequence, {expected} of "
            f"{sum(sizes)} tokens, got {sizes}"
        )
    return zigzag


def gather(rows: Tensor, zigzag: Zigzag, group: dist.ProcessGroup) -> Tensor:
    """Gather the whole sequence, of which ``rows`` ``[size, ...]`` is this rank's shard."""
    sizes = [zigzag.size(rank) for rank in range(zigzag.world)]
    longest = max(sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(zigzag.world, longest, *rows.shape[1:])
    if gathered.numel():
        dist.all_gather(list(gathered.unbind()), padded, group=group)
    parts = []
    for c in range(2 * zigzag.world):
        rank = min(c, 2 * zigzag.world - 1 - c)
        part = zigzag.local(c, zigzag.chunk(c))
        parts.append(gathered[rank, part.start : part.stop])
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, zigzag, group):
        ctx.zigzag, ctx.group = zigzag, group
        return gather(rows, zigzag, group)

    @staticmethod
    def backward(ctx, dwhole):
        total = dwhole.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        return shard_sequence(total, ctx.group, dim=0), None, None


def _rank_and_world(group: Group) -> tuple[int, int]:
    if not isinstance(group, tuple):
        return dist.get_rank(group), dist.get_world_size(group)
    rank, world = group
    if not 0 <= rank < world:
        raise ValueError(f"shard_sequence: rank must lie in [0, {world}), got {rank}")
    return group
