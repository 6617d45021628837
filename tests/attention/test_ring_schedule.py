"""Who sends what to whom: against the mask itself, without processes and without timing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu3_kernels.ops.attention.ring.schedule import MIN_PIECE, ring_schedule
from emu3_kernels.ops.attention.ring.shards import Zigzag, shard_sequence


@st.composite
def sequences(draw):
    """Documents of any length at any place: also empty chunks, and several sequences a batch."""
    world = draw(st.integers(1, 5))
    lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)
    batch = [draw(lengths) for _ in range(draw(st.integers(1, 2)))]
    tokens = min(sum(row) for row in batch)
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in batch]
    document_ids = torch.stack([row[:tokens] for row in ids])
    return world, document_ids, draw(st.booleans()), draw(st.integers(1, 4))


def visible(document_ids, causal):
    """Return the mask ``[T, T]`` of the pairs that meet in any sequence of the batch."""
    same = (document_ids[:, :, None] == document_ids[:, None, :]).any(0)
    return same.tril() if causal else same


def indices(ranges):
    return [i for part in ranges for i in part]


@given(sequences())
def test_a_token_is_sent_once_to_every_rank_that_sees_it_and_to_no_other(sequence):
    world, document_ids, causal, pieces = sequence
    tokens = document_ids.shape[1]
    schedule = ring_schedule(tokens, world, causal=causal, document_ids=document_ids)
    mask = visible(document_ids, causal)
    for owner in range(world):
        for reader in set(range(world)) - {owner}:
            keys, rows = (schedule.zigzag.positions(rank).long() for rank in (owner, reader))
            seen = mask[rows][:, keys].any(0).nonzero().squeeze(1).tolist()
            parts = [schedule.transfer(owner, reader, i, pieces) for i in range(pieces)]
            assert [i for part in parts for i in indices(part.keys)] == seen
            assert sum(part.num_keys for part in parts) == len(seen)


@given(sequences())
def test_the_queries_of_a_transfer_hold_all_that_see_its_keys(sequence):
    world, document_ids, causal, pieces = sequence
    tokens = document_ids.shape[1]
    schedule = ring_schedule(tokens, world, causal=causal, document_ids=document_ids)
    mask = visible(document_ids, causal)
    for owner in range(world):
        for reader in set(range(world)) - {owner}:
            keys, rows = (schedule.zigzag.positions(rank).long() for rank in (owner, reader))
            for i in range(pieces):
                part = schedule.transfer(owner, reader, i, pieces)
                see = mask[rows][:, keys[indices(part.keys)]].any(1).nonzero().squeeze(1)
                queries = indices(part.queries)
                assert len(part.queries) <= 2
                assert len(set(queries)) == len(queries)
                assert set(see.tolist()) <= set(queries)
                assert bool(part.queries) == bool(part.keys)


@given(sequences())
def test_what_is_sent_is_what_is_received(sequence):
    world, document_ids, causal, _ = sequence
    tokens = document_ids.shape[1]
    schedule = ring_schedule(tokens, world, causal=causal, document_ids=document_ids)
    sent = sum(schedule.num_sent(rank) for rank in range(world))
    assert sent == sum(schedule.num_received(rank) for rank in range(world))


@pytest.mark.parametrize("world", [2, 4, 8, 64])
def test_one_causal_document_takes_three_quarters_of_a_full_ring(world):
    """A rank before the reader is half seen, one after it wholly; all of it without causality."""
    tokens = 2 * world * 5
    schedule = ring_schedule(tokens, world)
    sent = sum(schedule.num_sent(rank) for rank in range(world))
    pairs = world * (world - 1) // 2
    assert sent == pairs * 5 + pairs * 10
    assert [schedule.num_sent(rank) for rank in (0, world - 1)] == [
        5 * (world - 1),
        10 * (world - 1),
    ]
    schedule = ring_schedule(tokens, world, causal=False)
    assert {schedule.num_sent(rank) for rank in range(world)} == {10 * (world - 1)}


def test_documents_that_end_with_chunks_are_not_sent():
    document_ids = torch.arange(8).repeat_interleave(6)[None]
    schedule = ring_schedule(48, 4, document_ids=document_ids)
    assert [schedule.num_sent(rank) for rank in range(4)] == [0, 0, 0, 0]


def test_of_a_document_across_an_edge_its_tail_alone_is_sent():
    """Chunks of 6: tokens 4 and 5 are seen from chunk 1, which is on rank 1."""
    document_ids = torch.tensor([0] * 4 + [1] * 3 + [2] * 41)[None]
    schedule = ring_schedule(48, 4, document_ids=document_ids)
    assert schedule.transfer(0, 1).keys == (range(4, 6),)
    assert schedule.transfer(0, 1).queries == (range(1),)
    assert schedule.transfer(0, 2).keys == ()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_causal_work_is_the_same_for_every_rank(world):
    tokens = 2 * world * 7
    mask = torch.ones(tokens, tokens).tril()
    shards = (Zigzag(tokens, world).positions(rank).long() for rank in range(world))
    assert len({mask[shard].sum().item() for shard in shards}) == 1


@pytest.mark.parametrize(("tokens", "pieces"), [(0, 1), (4 * MIN_PIECE, 1), (16 * MIN_PIECE, 4)])
def test_short_shards_are_not_cut(tokens, pieces):
    steps = list(ring_schedule(tokens, 4).steps(8))
    assert steps == [(hop, piece, pieces) for hop in (1, 2, 3) for piece in range(pieces)]


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_are_all_tokens_once_in_ascending_order(tokens, world):
    zigzag = Zigzag(tokens, world)
    shards = [shard_sequence(torch.arange(tokens), (rank, world), dim=0) for rank in range(world)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, zigzag.positions(rank))
        assert len(shard) == zigzag.size(rank)
        assert bool((shard.diff() > 0).all())
    assert torch.cat(shards).sort().values.tolist() == list(range(tokens))
    assert max(map(len, shards)) - min(map(len, shards)) <= 2


def test_a_rank_that_is_not_in_the_world_is_refused():
    with pytest.raises(ValueError, match=r"shard_sequence: rank must lie in \[0, 2\), got 2"):
        shard_sequence(torch.zeros(1, 8), (2, 2))
