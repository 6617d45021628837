"""The ring of a rank: keys arrive while others are attended to, results merge in order of hops."""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels._attention.spans import Dropout, Spans, spans_of
from emu3_kernels.ops.ring_attention.exchange import Posted
from emu3_kernels.ops.ring_attention.schedule import Schedule, Transfer

FORWARD_PIECES, BACKWARD_PIECES = 4, 8
"""Pieces of a long shard that travel one by one. Keys of two pieces are here at a time, backward
float32 gradients of four: an eighth keeps a training step within 1.5 times the shards of q, k, v,
out and their gradients and the keys and values of two whole hops."""


class Call(NamedTuple):
    """What a call is, beside q, k and v."""

    group: dist.ProcessGroup
    schedule: Schedule
    document_ids: Tensor | None
    """``[B, T]`` of the whole sequence."""
    scale: float
    dropout_p: float
    seed: Tensor | None
    kernels: ModuleType


class Step(NamedTuple):
    owner: int
    reader: int
    reads: Transfer
    sends: Transfer


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out in the dtype of ``q`` and the lse over all keys of the ring."""
    hops = _Hops(call, FORWARD_PIECES, q.device)
    arriving = hops.fetch(0, k, v)
    mine = hops.mask(hops.rows, hops.rows)
    out, lse = call.kernels.forward(q, k, v, *mine, wide=hops.world > 1)
    lse = lse.double()  # a rounding at every hop would double the error of probabilities
    for t, step in enumerate(hops.steps):
        keys = arriving.wait()
        arriving = hops.fetch(t + 1, k, v)
        for part in map(_slice, step.reads.queries):
            mask = hops.mask(hops.rows[part], hops.columns(step))
            _merge(
                out[:, part],
                lse[:, :, part],
                *call.kernels.forward(q[:, part], *keys, *mask, wide=True),
            )
    return out.to(q.dtype), lse.float()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; those of a key are added up by its owner, in the order of hops."""
    hops = _Hops(call, BACKWARD_PIECES, q.device)
    arriving = hops.fetch(0, k, v)
    delta = _delta(dout, out)
    mine = hops.mask(hops.rows, hops.rows)
    wide = hops.world > 1
    dq, dk, dv = call.kernels.backward(dout, q, k, v, lse, delta, *mine, wide=wide)
    returning = None
    for t, step in enumerate(hops.steps):
        keys = arriving.wait()
        arriving = hops.fetch(t + 1, k, v)
        dkeys: list[Tensor] = []
        for part in map(_slice, step.reads.queries):
            mask = hops.mask(hops.rows[part], hops.columns(step))
            queries = dout[:, part], q[:, part]
            rest = lse[:, :, part].contiguous(), delta[:, :, part].contiguous()
            _add(
                dq[:, part],
                dkeys,
                *call.kernels.backward(*queries, *keys, *rest, *mask, wide=True),
            )
        if returning:
            hops.collect(t - 1, returning, dk, dv)
        returning = hops.give_back(t, dkeys, dk)
    if returning:
        hops.collect(len(hops.steps) - 1, returning, dk, dv)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Hops:
    """The steps of a rank, and its messages in each.

    Every rank posts the keys of step t + 1 before the gradients of step t, and waits only for
    what was posted before: no order of arrival can lock the ring.
    """

    def __init__(self, call: Call, most_pieces: int, device: torch.device):
        self.call, schedule = call, call.schedule
        self.rank, self.world = dist.get_rank(call.group), schedule.zigzag.world
        self.rows = schedule.zigzag.positions(self.rank, device)
        self.steps = []
        for hop, *piece in schedule.steps(most_pieces):
            owner, reader = (self.rank - hop) % self.world, (self.rank + hop) % self.world
            reads = schedule.transfer(owner, self.rank, *piece)
            sends = schedule.transfer(self.rank, reader, *piece)
            self.steps.append(Step(owner, reader, reads, sends))

    def mask(self, rows: Tensor, columns: Tensor) -> tuple[Spans, float, Dropout | None]:
        """Say what queries at the positions ``rows`` see and drop of keys at ``columns``."""
        call = self.call
        ids = call.document_ids
        documents = () if ids is None else (ids[:, rows], ids[:, columns])
        spans = spans_of(rows, columns, *documents, causal=call.schedule.causal)
        dropped = Dropout(call.dropout_p, call.seed, rows, columns) if call.dropout_p > 0 else None
        return spans, call.scale, dropped

    def columns(self, step: Step) -> Tensor:
        positions = self.call.schedule.zigzag.positions(step.owner, self.rows.device)
        return _pick(positions, step.reads, dim=0)

    def fetch(self, t: int, k: Tensor, v: Tensor) -> Posted | None:
        """Begin to send and receive the keys and values of step ``t``."""
        if t >= len(self.steps):
            return None
        step = self.steps[t]
        sent = (_pick(x, step.sends) for x in (k, v)) if step.sends.keys else ()
        received = (_room(x, step.reads, x.dtype) for x in (k, v)) if step.reads.keys else ()
        return Posted(sent, step.reader, received, step.owner, self.call.group)

    def give_back(self, t: int, dkeys: list[Tensor], k: Tensor) -> Posted:
        """Begin to return the gradients of the keys of step ``t`` to their owner."""
        step = self.steps[t]
        received = (
            [_room(k, step.sends, torch.float32) for _ in range(2)] if step.sends.keys else ()
        )
        sent = (x.contiguous() for x in dkeys)
        return Posted(sent, step.owner, received, step.reader, self.call.group)

    def collect(self, t: int, returning: Posted, *totals: Tensor) -> None:
        """Add the gradients of what was sent in step ``t``."""
        for total, part in zip(totals, returning.wait(), strict=False):
            first = 0
            for keys in self.steps[t].sends.keys:
                total[:, keys.start : keys.stop] += part[:, first : first + len(keys)]
                first += len(keys)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Make ``out`` and ``lse`` those of both sets of keys, in place; the others are used up."""
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


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _pick(tensor: Tensor, transfer: Transfer, dim: int = 1) -> Tensor:
    parts = [tensor.narrow(dim, keys.start, len(keys)) for keys in transfer.keys]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def _room(like: Tensor, transfer: Transfer, dtype: torch.dtype) -> Tensor:
    batch, _, groups, width = like.shape
    return like.new_empty(batch, transfer.num_keys, groups, width, dtype=dtype)
