"""The ring of a rank: keys arrive while others are attended to, results merge in order of hops."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.ring.exchange import Posted
from emu3_kernels.ops.attention.ring.schedule import Schedule, Transfer
from emu3_kernels.ops.attention.spans import Dropout, Spans, spans_of

FORWARD_PIECES, BACKWARD_PIECES = 4, 8
"""Pieces of a long shard that travel one by one. Keys of two pieces are here at a time, backward
float32 gradients of four, and what a kernel keeps of a piece of queries: eighths keep a training
step within 1.5 times q, k, v, out and their gradients and the keys and values of two whole hops."""


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
        for part in _cut(step.reads.queries, len(hops.rows)):
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
    queries = dout, q, lse, _delta(dout, out)
    if hops.world == 1:
        mask = hops.mask(hops.rows, hops.rows)
        return call.kernels.backward(dout, q, k, v, *queries[2:], *mask, wide=False)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for step in hops.own:
        keys = [_pick(x, step.reads) for x in (k, v)] if step.reads.keys else []
        _collect(step.reads, hops.pull_back(step, queries, keys, dq), dk, dv)
    returning, sent = None, Transfer((), ())
    for t, step in enumerate(hops.steps):
        keys = arriving.wait()
        arriving = hops.fetch(t + 1, k, v)
        dkeys = hops.pull_back(step, queries, keys, dq)
        if returning:
            _collect(sent, returning.wait(), dk, dv)
        returning, sent = hops.give_back(step, dkeys, dk), step.sends
    _collect(sent, returning.wait(), dk, dv)
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
        pieces = schedule.num_pieces(most_pieces)
        # Queries of a kernel: what it keeps of them is no more than a piece either.
        self.most_rows = max(1, -(-len(self.rows) // pieces))
        nothing = Transfer((), ())
        self.own = [
            Step(self.rank, self.rank, schedule.transfer(self.rank, self.rank, i, pieces), nothing)
            for i in range(pieces)
        ]
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

    def pull_back(
        self, step: Step, queries: tuple[Tensor, ...], keys: list[Tensor], dq: Tensor
    ) -> list[Tensor]:
        """Add to ``dq`` what the keys of a step give, and return their dk and dv."""
        dout, q, lse, delta = queries
        dkeys: list[Tensor] = []
        for part in _cut(step.reads.queries, self.most_rows):
            sums = lse[:, :, part].contiguous(), delta[:, :, part].contiguous()
            mask = self.mask(self.rows[part], self.columns(step))
            _add(
                dq[:, part],
                dkeys,
                *self.call.kernels.backward(
                    dout[:, part], q[:, part], *keys, *sums, *mask, wide=True
                ),
            )
        return dkeys

    def give_back(self, step: Step, dkeys: list[Tensor], k: Tensor) -> Posted:
        """Begin to return the gradients of the keys of a step to their owner."""
        sent = (x.contiguous() for x in dkeys)
        received = [_room(k, step.sends, torch.float32) for _ in range(2 * bool(step.sends.keys))]
        return Posted(sent, step.owner, received, step.reader, self.call.group)


def _collect(sent: Transfer, parts: list[Tensor], *totals: Tensor) -> None:
    """Add the gradients of the keys that were sent."""
    for total, part in zip(totals, parts, strict=False):
        first = 0
        for keys in sent.keys:
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


def _cut(ranges: tuple[range, ...], longest: int) -> Iterator[slice]:
    for whole in ranges:
        for first in range(whole.start, whole.stop, longest):
            yield slice(first, min(first + longest, whole.stop))


def _pick(tensor: Tensor, transfer: Transfer, dim: int = 1) -> Tensor:
    parts = [tensor.narrow(dim, keys.start, len(keys)) for keys in transfer.keys]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def _room(like: Tensor, transfer: Transfer, dtype: torch.dtype) -> Tensor:
    batch, _, groups, width = like.shape
    return like.new_empty(batch, transfer.num_keys, groups, width, dtype=dtype)
