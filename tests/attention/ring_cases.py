"""What every rank of a ring runs in the tests of ring_attention."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from threading import Event
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels import attention, ring_attention, shard_sequence, unshard_sequence
from emu3_kernels.ops.attention import reference
from emu3_kernels.ops.attention.ring import ring, schedule
from emu3_kernels.ops.attention.ring.agreement import LostRankError
from emu3_kernels.runtime import dispatch
from emu3_kernels.testing.budget import assert_as_accurate
from tests.attention import plain_attention

NAMES = "out", "dq", "dk", "dv"
PLAIN = {"plain": plain_attention.BACKEND}


def make(
    *,
    tokens: int,
    starts: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    width: int = 8,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Draw a whole sequence; ``starts`` of documents for every sequence of the batch."""
    random = torch.Generator().manual_seed(seed)
    batch = len(starts) if starts else batch

    def draw(count):
        return torch.randn(batch, tokens, count, width, generator=random).to(dtype)

    position = torch.arange(tokens)
    ids = [torch.searchsorted(torch.tensor(s), position, right=True).int() for s in starts or []]
    return {
        "q": draw(heads),
        "k": draw(groups),
        "v": draw(groups),
        "dout": draw(heads),
        "document_ids": torch.stack(ids) if ids else None,
    }


@contextmanager
def pieces_of(tokens: int) -> Iterator[None]:
    """Split the shards of a test as if they were long, and add the plain kernels to both ops."""
    with (
        mock.patch.object(schedule, "MIN_PIECE", tokens),
        mock.patch.dict(dispatch.backends("ring_attention"), PLAIN),
        mock.patch.dict(dispatch.backends("attention"), {"plain": plain_attention.WHOLE}),
    ):
        yield


def on_a_ring(group, whole: dict, **settings: object) -> tuple[Tensor, ...]:
    """Return the shards of out, dq, dk and dv."""
    cut = {
        name: None if x is None else shard_sequence(x, group, dim=1) for name, x in whole.items()
    }
    leaves = [cut[name].requires_grad_() for name in ("q", "k", "v")]
    out = ring_attention(*leaves, group=group, document_ids=cut["document_ids"], **settings)
    return out.detach(), *torch.autograd.grad(out, leaves, cut["dout"])


def in_one_process(whole: dict, dtype: torch.dtype, function: Callable) -> tuple[Tensor, ...]:
    leaves = [whole[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v")]
    out = function(*leaves, document_ids=whole["document_ids"])
    return out.detach(), *torch.autograd.grad(out, leaves, whole["dout"].to(dtype))


def equals_one_process(group, size: dict, backend: str, **settings: object) -> None:
    """CPU C++ and Triton may make the errors of the same kernels in one process, if larger."""
    whole, dtype = make(**size), size.get("dtype", torch.float32)
    if settings.get("dropout_p"):
        settings["seed"] = torch.tensor(-1234567890123)
    with pieces_of(3):
        shards = on_a_ring(group, whole, backend=backend, **settings)
        actual = [unshard_sequence(x, group) for x in shards]
        if dist.get_rank(group) == 0:
            definition = partial(reference.attention, **settings)
            exact = in_one_process(whole, torch.float64, definition)
            alone = [definition]
            if backend in ("cpu", "triton"):
                alone.append(partial(attention, backend=backend, **settings))
            lows = zip(*(in_one_process(whole, dtype, one) for one in alone), strict=True)
            for name, x, low, truth in zip(NAMES, actual, lows, exact, strict=True):
                worst = max(low, key=partial(error, truth)) if truth.numel() else low[0]
                assert_as_accurate(name, x, worst, truth)


def error(exact: Tensor, actual: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def all_equal_one_process(group, sizes: list[dict], backend: str, settings: dict) -> None:
    for size in sizes:
        equals_one_process(group, size, backend, **settings)


def gives_the_same_bits_twice(group, size: dict, backend: str) -> None:
    with pieces_of(3):
        first, second = (on_a_ring(group, make(**size), backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def counts_bytes(group, size: dict, **settings: object) -> tuple[int, int]:
    """Return the bytes that this rank sends, forward and backward."""
    sent = []

    def counting(op, tensor, **where):
        if op is dist.isend:
            sent.append(tensor.nbytes)
        return original(op, tensor, **where)

    original = dist.P2POp
    cut = make(**size)
    cut = {name: None if x is None else shard_sequence(x, group) for name, x in cut.items()}
    leaves = [cut[name].requires_grad_() for name in ("q", "k", "v")]
    with pieces_of(3), mock.patch.object(dist, "P2POp", counting):
        out = ring_attention(*leaves, group=group, document_ids=cut["document_ids"], **settings)
        forward = sum(sent)
        out.backward(cut["dout"])
    return forward, sum(sent) - forward


def records_the_order(group, size: dict) -> list[str]:
    """Return the order of messages posted, awaited and of kernels called."""
    events = []

    def recording(event, function, *args, **settings):
        events.append(event)
        return function(*args, **settings)

    posted = ring.Posted
    forward = partial(recording, "attend", plain_attention.forward)
    recorded = replace(plain_attention.BACKEND, forward=forward)
    with (
        pieces_of(3),
        mock.patch.object(ring, "Posted", partial(recording, "post", posted)),
        mock.patch.object(posted, "wait", partial_method(recording, "wait", posted.wait)),
        mock.patch.dict(dispatch.backends("ring_attention"), {"plain": recorded}),
    ):
        on_a_ring(group, make(**size), backend="plain")
    return events


def partial_method(recording, event, function):
    return lambda self: recording(event, function, self)


def draws_the_seed_of_rank_0(group) -> None:
    """Each rank would draw another."""
    whole = make(tokens=24)
    torch.manual_seed(dist.get_rank(group))
    with pieces_of(3):
        out, *_ = on_a_ring(group, whole, backend="plain", dropout_p=0.4)
    torch.manual_seed(0)
    seed = torch.randint(torch.iinfo(torch.int64).max, ())
    settings = {"dropout_p": 0.4, "seed": seed, "document_ids": None}
    expected = reference.attention(*(whole[name] for name in ("q", "k", "v")), **settings)
    torch.testing.assert_close(out, shard_sequence(expected, group))


def there_and_back(group, tokens: int, dim: int, dtype: torch.dtype) -> None:
    whole = torch.arange(3 * tokens).view(3, tokens).movedim(1, dim).contiguous().to(dtype)
    assert torch.equal(unshard_sequence(shard_sequence(whole, group, dim), group, dim), whole)


def gradient_of_the_whole(group) -> None:
    """Rank r weighs the whole by r + 1: a shard's gradient is the sum over the ranks."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shard = shard_sequence(torch.randn(2, 19, 3), group).requires_grad_()
    ((rank + 1) * unshard_sequence(shard, group)).sum().backward()
    assert torch.equal(shard.grad, torch.full_like(shard, world * (world + 1) / 2))


def is_attention_bit_for_bit(group, size: dict, backend: str) -> None:
    """Both ops on the same kernels: those of attention may have others before them."""
    whole = make(**size)
    with pieces_of(3):
        actual = on_a_ring(group, whole, backend=backend)
        leaves = [whole[name].requires_grad_() for name in ("q", "k", "v")]
        out = attention(*leaves, document_ids=whole["document_ids"], backend=backend)
        expected = out, *torch.autograd.grad(out, leaves, whole["dout"])
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(x, y), name


def compiles_around_the_ring(group, size: dict) -> int:
    """Compare with the eager function, twice; return the number of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds

    cut = {name: shard_sequence(x, group) for name, x in make(**size).items()}
    leaves = [cut[name].requires_grad_() for name in ("q", "k", "v")]

    def layer(q, k, v):
        return 3 * ring_attention(q.sin(), k, v, group=group, document_ids=cut["document_ids"])

    graphs = CompileCounterWithBackend("aot_eager")
    for function in (torch.compile(layer, backend=graphs),) * 2:
        actual, expected = function(*leaves), layer(*leaves)
        assert torch.equal(actual, expected)
        grads = (torch.autograd.grad(out, leaves, cut["dout"]) for out in (actual, expected))
        assert all(torch.equal(a, e) for a, e in zip(*grads, strict=True))
    return graphs.frame_count


def raises(group, differs: dict) -> str:
    """Call with ``differs`` on rank 1; return the exception."""
    whole = make(tokens=24)
    call: dict = {name: shard_sequence(whole[name], group) for name in ("q", "k", "v")}
    if dist.get_rank(group) == 1:
        call |= differs
    try:
        with pieces_of(3):
            ring_attention(**call, group=group)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def decreasing_documents(group) -> str:
    """Each shard ascends, the sequence does not: 1, 0, 1, 1 in its chunks."""
    whole = make(tokens=24, starts=[[0, 6, 12]])
    whole["document_ids"] %= 2
    whole["document_ids"][:, 18:] = 1
    cut = {name: shard_sequence(x, group) for name, x in whole.items() if name != "dout"}
    try:
        ring_attention(**cut, group=group)
    except ValueError as error:
        return str(error)
    return "nothing"


def survives(group, how: str, where: str) -> tuple[str, float]:
    """Rank 1 fails; return what the others raise, and after how many seconds."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    original = getattr(plain_attention, where)

    def failing(q, *rest, **settings):
        if dist.get_rank(group) == 1 and settings["float32_out"] and not done.is_set():
            done.set()
            if how == "dies":
                os._exit(1)
            raise MemoryError("no memory")
        return original(q, *rest, **settings)

    done = Event()
    start = time.monotonic()
    backend = replace(plain_attention.BACKEND, **{where: failing})
    plain = mock.patch.dict(dispatch.backends("ring_attention"), {"plain": backend})
    try:
        with pieces_of(3), plain:
            if how == "absent" and dist.get_rank(group) == 1:
                return "", 0.0
            on_a_ring(group, make(tokens=96), backend="plain")
    except (LostRankError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", time.monotonic() - start
