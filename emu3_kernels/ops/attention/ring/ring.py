"""The ring of one rank: keys arrive during the work on others; results merge in order of hops."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges, key_ranges_of
from emu3_kernels.ops.attention.ring.exchange import Posted
from emu3_kernels.ops.attention.ring.schedule import Schedule, Transfer
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.dropout import HeadShard

FORWARD_PIECES, BACKWARD_PIECES = 4, 8
"""Pieces in which a long shard is sent. Keys of two pieces are in memory at a time, backward
float32 gradients of four, and the temporaries of a kernel on a piece of queries: eighths keep a
training step within 1.5 times q, k, v, out and their gradients and the keys and values of two
whole hops."""


class Call(NamedTuple):
    """The arguments of a call beside q, k and v."""

    group: dist.ProcessGroup
    schedule: Schedule
    document_ids: Tensor | None
    """``[B, T]`` of the whole sequence."""
    scale: float
    dropout_p: float
    seed: Tensor | None
    dropout_heads: HeadShard | None
    backend: Backend


class Step(NamedTuple):
    owner: int
    reader: int
    reads: Transfer
    sends: Transfer


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out in the dtype of ``q`` and the lse over all keys of the ring."""
    hops = _Hops(call, FORWARD_PIECES, q.device)
    arriving = hops.fetch(0, k, v)
    own = hops.settings(hops.q_positions, hops.q_positions)
    out, lse = call.backend.forward(q, k, v, *own, float32_out=hops.world > 1)
    lse = lse.double()  # a rounding at every hop would double the error of probabilities
    for t, step in enumerate(hops.steps):
        keys = arriving.wait()
        arriving = hops.fetch(t + 1, k, v)
        for part in _slices(step.reads.queries, len(hops.q_positions)):
            settings = hops.settings(hops.q_positions[part], hops.k_positions(step))
            _merge(
                out[:, part],
                lse[:, :, part],
                *call.backend.forward(q[:, part], *keys, *settings, float32_out=True),
            )
    return out.to(q.dtype), lse.float()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; those of a key are added up by its owner, in the order of hops."""
    hops = _Hops(call, BACKWARD_PIECES, q.device)
    arriving = hops.fetch(0, k, v)
    queries = dout, q, lse, _delta(dout, out)
    if hops.world == 1:
        settings = hops.settings(hops.q_positions, hops.q_positions)
        return call.backend.backward(dout, q, k, v, *queries[2:], *settings)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for step in hops.own:
        keys = [_select(x, step.reads) for x in (k, v)] if step.reads.keys else []
        _collect(step.reads, hops.backward(step, queries, keys, dq), dk, dv)
    returning, sent = None, Transfer((), ())
    for t, step in enumerate(hops.steps):
        keys = arriving.wait()
        arriving = hops.fetch(t + 1, k, v)
        dkeys = hops.backward(step, queries, keys, dq)
        if returning:
            _collect(sent, returning.wait(), dk, dv)
        returning, sent = hops.return_gradients(step, dkeys, dk), step.sends
    _collect(sent, returning.wait(), dk, dv)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Hops:
    """The steps of a rank, and its messages in each.

    Every rank posts the keys of step t + 1 before the gradients of step t, and waits only for
    messages posted before: no order of arrival can deadlock the ring.
    """

    def __init__(self, call: Call, max_pieces: int, device: torch.device):
        self.call, schedule = call, call.schedule
        self.rank, self.world = dist.get_rank(call.group), schedule.zigzag.world
        self.q_positions = schedule.zigzag.positions(self.rank, device)
        pieces = schedule.num_pieces(max_pieces)
        # Queries of a launch: its temporaries are no larger than those of a piece either.
        self.max_queries = max(1, -(-len(self.q_positions) // pieces))
        nothing = Transfer((), ())
        self.own = [
            Step(self.rank, self.rank, schedule.transfer(self.rank, self.rank, i, pieces), nothing)
            for i in range(pieces)
        ]
        self.steps = []
        for hop, *piece in schedule.steps(max_pieces):
            owner, reader = (self.rank - hop) % self.world, (self.rank + hop) % self.world
            reads = schedule.transfer(owner, self.rank, *piece)
            sends = schedule.transfer(self.rank, reader, *piece)
            self.steps.append(Step(owner, reader, reads, sends))

    def settings(
        self, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[KeyRanges, float, Dropout | None]:
        """Return what a kernel takes beside tensors: key ranges, scale and dropout."""
        call, positions = self.call, (q_positions, k_positions)
        ids = call.document_ids
        documents = () if ids is None else (ids[:, x] for x in positions)
        key_ranges = key_ranges_of(*positions, *documents, causal=call.schedule.causal)
        dropout = None
        if call.dropout_p > 0:
            dropout = Dropout(call.dropout_p, call.seed, *positions, call.dropout_heads)
        return key_ranges, call.scale, dropout

    def k_positions(self, step: Step) -> Tensor:
        positions = self.call.schedule.zigzag.positions(step.owner, self.q_positions.device)
        return _select(positions, step.reads, dim=0)

    def fetch(self, t: int, k: Tensor, v: Tensor) -> Posted | None:
        """Begin to send and receive the keys and values of step ``t``."""
        if t >= len(self.steps):
            return None
        step = self.steps[t]
        sent = (_select(x, step.sends) for x in (k, v)) if step.sends.keys else ()
        received = (_empty(x, step.reads, x.dtype) for x in (k, v)) if step.reads.keys else ()
        return Posted(sent, step.reader, received, step.owner, self.call.group)

    def backward(
        self, step: Step, queries: tuple[Tensor, ...], keys: list[Tensor], dq: Tensor
    ) -> list[Tensor]:
        """Add to ``dq`` the part of the keys of a step, and return their dk and dv."""
        dout, q, lse, delta = queries
        dkeys: list[Tensor] = []
        for part in _slices(step.reads.queries, self.max_queries):
            sums = lse[:, :, part].contiguous(), delta[:, :, part].contiguous()
            settings = self.settings(self.q_positions[part], self.k_positions(step))
            _add(
                dq[:, part],
                dkeys,
                *self.call.backend.backward(
                    dout[:, part], q[:, part], *keys, *sums, *settings, float32_out=True
                ),
            )
        return dkeys

    def return_gradients(self, step: Step, dkeys: list[Tensor], k: Tensor) -> Posted:
        """Begin to return the gradients of the keys of a step to their owner."""
        sent = (x.contiguous() for x in dkeys)
        received = [_empty(k, step.sends, torch.float32) for _ in range(2 * bool(step.sends.keys))]
        return Posted(sent, step.owner, received, step.reader, self.call.group)


def _collect(sent: Transfer, parts: list[Tensor], *totals: Tensor) -> None:
    """Add the gradients of the keys that were sent."""
    for total, part in zip(totals, parts, strict=False):
        first = 0
        for keys in sent.keys:
            total[:, keys.start : keys.stop] += part[:, first : first + len(keys)]
            first += len(keys)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Update ``out`` and ``lse`` in place to those of both sets of keys; overwrites the others."""
    weight = (other_lse - lse).sigmoid_().masked_fill_(other_lse == -torch.inf, 0)
    lse.copy_(torch.logaddexp(lse, other_lse.double()))
    out.addcmul_(other_out.sub_(out), weight.float().transpose(1, 2)[..., None])


def _add(dq: Tensor, dkeys: list[Tensor], some_dq: Tensor, *some_dkeys: Tensor) -> None:
    dq += some_dq
    if dkeys:
        for total, part in zip(dkeys, some_dkeys, strict=True):
            total += part
    else:
        dkeys.extend(some_dkeys)


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return ``sum(dout * out)`` ``[B, H, T]``, float32, an eighth at a time."""
    parts = zip(dout.chunk(8, dim=1), out.chunk(8, dim=1), strict=True)
    return torch.cat(
        [torch.einsum("bthk,bthk->bht", x.float(), y.float()) for x, y in parts], dim=2
    )


def _slices(ranges: tuple[range, ...], longest: int) -> Iterator[slice]:
    for whole in ranges:
        for first in range(whole.start, whole.stop, longest):
            yield slice(first, min(first + longest, whole.stop))


def _select(tensor: Tensor, transfer: Transfer, dim: int = 1) -> Tensor:
    parts = [tensor.narrow(dim, keys.start, len(keys)) for keys in transfer.keys]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def _empty(like: Tensor, transfer: Transfer, dtype: torch.dtype) -> Tensor:
    batch, _, num_kv_heads, head_dim = like.shape
    return like.new_empty(batch, transfer.num_keys, num_kv_heads, head_dim, dtype=dtype)
