"""ring_attention on 1, 2, 4 and 8 processes: equal to one process, exact traffic, never hanging."""

import os
import re
from contextlib import closing

import pytest
import torch

from emu3_kernels import HeadShard, ring_attention
from emu3_kernels.ops.attention.ring.schedule import ring_schedule
from emu3_kernels.runtime import dispatch
from tests.attention import ring_cases as cases
from tests.ranks import Ranks

REQUIRED = os.environ.get("EMU3_REQUIRE", "").split(",")
BACKENDS = dispatch.backends("ring_attention")
KERNELS = ["plain", *(name for name in BACKENDS if name not in ("triton", "reference"))]
WORLDS = [2, 4, 8]
SETTINGS = [{}, {"causal": False}, {"dropout_p": 0.4}]


@pytest.fixture(scope="module")
def ranks():
    groups = {world: Ranks(world) for world in (1, *WORLDS)}
    yield groups.__getitem__
    for group in groups.values():
        group.close()


def sizes(world):
    """Chunks of 8, documents that begin at, just before and after their edges; and others."""
    tokens, edges = 16 * world, list(range(8, 16 * world, 8))
    random = torch.Generator().manual_seed(world)
    drawn = torch.randperm(tokens, generator=random)
    splits = [
        [edges, [edge - 1 for edge in edges], [edge + 1 for edge in edges]],
        [list(range(1, tokens)), [1, tokens - 1]],  # documents of one token
        [sorted(drawn[: 2 * world].tolist()), sorted(drawn[:3].tolist()), []],  # and one document
    ]
    documents = [{"tokens": tokens, "starts": starts} for starts in splits]
    ragged = {"tokens": tokens + 5, "heads": 4, "groups": 2}
    few = {"tokens": world + 1, "batch": 2}  # ranks with one chunk, or none
    return [ragged, few, {"tokens": 0}, *documents]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kernels", [*KERNELS, "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_gradients_are_those_of_one_process(ranks, world, kernels, settings):
    ranks(world).run(cases.all_equal_one_process, sizes(world), kernels, settings)


@pytest.mark.parametrize("kernels", [*KERNELS, "reference"])
def test_heads_of_a_rank_drop_what_they_drop_in_the_whole(ranks, kernels):
    size = {"tokens": 37, "starts": [[3, 20], [9]], "heads": 4, "groups": 2}
    heads = HeadShard(num_heads=12, first=8, first_sequence=5)
    settings = {"dropout_p": 0.4, "dropout_heads": heads}
    ranks(2).run(cases.all_equal_one_process, [size], kernels, settings)


def test_a_compiled_function_breaks_its_graph_at_the_ring(ranks):
    """Dynamo crashed in the schedule, whose sizes it took for symbols."""
    size = {"tokens": 48, "starts": [[7, 30], [9]]}
    assert ranks(2).run(cases.compiles_around_the_ring, size) == [2, 2]


@pytest.mark.parametrize("kernels", [*KERNELS, "reference"])
def test_bfloat16_is_merged_in_float32(ranks, kernels):
    low = {"dtype": torch.bfloat16, "width": 64}
    few = [{"tokens": 131, **low}, {"tokens": 131, "starts": [[30], [31, 64, 65, 99]], **low}]
    ranks(4).run(cases.all_equal_one_process, few, kernels, {})


def test_triton_runs_the_ring_too(ranks):
    """Its interpreter is slow: in float32, one sequence with a document across every edge."""
    size = {"tokens": 35, "starts": [[3, 20]], "width": 16}
    ranks(2).run(cases.all_equal_one_process, [size], "triton", {"dropout_p": 0.4})


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_required_backend_is_there(name):
    assert name not in REQUIRED or not isinstance(BACKENDS.get(name, "absent"), str)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_ring_of_one_is_attention_bit_for_bit(ranks, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        size = {"tokens": 83, "starts": [[30], [0, 1, 80]], "heads": 4, "groups": 2, "dtype": dtype}
        ranks(1).run(cases.is_attention_bit_for_bit, size, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_two_runs_give_the_same_bits(ranks, kernels):
    ranks(4).run(cases.gives_the_same_bits_twice, {"tokens": 70, "batch": 2}, kernels)


def test_without_a_seed_the_ranks_drop_by_that_of_rank_0(ranks):
    ranks(4).run(cases.draws_the_seed_of_rank_0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("starts", [None, [[7, 8, 50], [61]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_sent_are_those_of_the_formula(ranks, world, starts, dtype):
    """k and v to every rank that attends to them; backward once more, and dk and dv back."""
    size = {"tokens": 16 * world + 3, "starts": starts, "heads": 6, "groups": 2, "dtype": dtype}
    sent = ranks(world).run(cases.counts_bytes, size)
    plan = ring_schedule(size["tokens"], world, document_ids=cases.make(**size)["document_ids"])
    for rank, actual in enumerate(sent):
        values = 2 * len(starts or [1]) * 2 * 8  # k and v, batch, KV heads, head_dim
        forward = plan.num_sent(rank) * values * dtype.itemsize
        assert actual == (forward, forward + plan.num_received(rank) * values * 4)


def test_nothing_is_sent_where_documents_do_not_meet(ranks):
    size = {"tokens": 64, "starts": [list(range(8, 64, 8))]}
    assert ranks(4).run(cases.counts_bytes, size) == [(0, 0)] * 4


def test_the_next_keys_are_sent_while_the_kernels_run(ranks):
    for events in ranks(2).run(cases.records_the_order, {"tokens": 48}):
        forward = events[: events.index("wait") + 1]
        assert forward == ["post", "attend", "wait"]  # the keys of step 0 go before the own shard
        posts = [i for i, event in enumerate(events) if event == "post"]
        assert events[posts[1] - 1] == "wait"
        assert "attend" in events[posts[1] : posts[2]]


@pytest.mark.parametrize(("tokens", "dim"), [(19, 1), (16, 0), (3, 1), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_shards_gather_to_the_whole(ranks, tokens, dim, dtype):
    ranks(4).run(cases.there_and_back, tokens, dim, dtype)


def test_the_gradient_of_a_shard_is_that_of_all_ranks(ranks):
    ranks(4).run(cases.gradient_of_the_whole)


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"scale": 0.5}, r"all ranks must pass the same scale, got \[0.35"),
        ({"causal": False}, r"all ranks must pass the same causal, got \[1.0, 0.0\]"),
        ({"backend": "reference"}, "all ranks must pass the same backend"),
        ({"dropout_p": 0.5}, "all ranks must pass the same dropout_p"),
        ({"dropout_heads": HeadShard(2)}, "all ranks must pass the same num_heads_of_dropout"),
        ({"q": torch.zeros(1, 12, 4, 8)}, r"the same num_heads, got \[2.0, 4.0\]"),
        ({"q": torch.zeros(1, 12, 2, 8).requires_grad_()}, "the same needs_gradient"),
        ({"document_ids": torch.zeros(1, 12, dtype=torch.int32)}, "the same document_ids"),
    ],
)
def test_ranks_that_differ_all_raise(ranks, differs, message):
    first, second = ranks(2).run(cases.raises, differs)
    assert re.match(f"ValueError: ring_attention: .*{message}", first), first
    assert second == first


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        (
            {"k": torch.zeros(1, 12, 1, 6)},
            r"ValueError: ring_attention: q must be \[B, T/P, H, K\]",
        ),
        ({"q": torch.zeros(12)}, r"ValueError: ring_attention: q must be \[B, "),
        ({"document_ids": torch.zeros(1, 12)}, "TypeError: ring_attention: document_ids must be i"),
        ({"dropout_p": 1.0}, "ValueError: ring_attention: dropout_p must lie in"),
        ({"backend": "cobol"}, "ValueError: ring_attention: unknown backend 'cobol'"),
    ],
)
def test_invalid_arguments_of_one_rank_raise_on_all(ranks, differs, message):
    """Checked before any keys are sent: otherwise the others would wait for them."""
    first, second = ranks(2).run(cases.raises, differs)
    assert re.match(message, second), second
    assert first == f"ValueError: {second.partition(': ')[2]} (on rank 1)"


def test_other_shards_than_those_of_one_sequence_are_refused(ranks):
    cut = {name: torch.zeros(1, 9, heads, 8) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    for message in ranks(2).run(cases.raises, cut):
        assert "must hold the zigzag shards of one sequence, [11, 10] of 21 tokens" in message


def test_document_ids_that_decrease_are_refused_on_every_rank(ranks):
    for message in ranks(2).run(cases.decreasing_documents):
        assert message == (
            "ring_attention: document_ids must not decrease along the whole sequence"
        )


def test_without_a_group_there_is_no_ring():
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(TypeError, match="ring_attention: group must be a process group"):
        ring_attention(q, q, q, group=None)


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_when_a_rank_fails_the_others_fail_and_say_why(where, how):
    """Within the 3 seconds of the group in each wait; those that talk to a dead rank at once."""
    with closing(Ranks(4)) as ranks:
        results = ranks.run(cases.survives, how, where, may_die=1)
    others = [results[rank] for rank in (0, 2, 3)]
    for message, seconds in others:
        assert message.startswith("LostRankError: ring_attention: rank "), message
        assert seconds < 10
        if how == "raises":
            assert "rank 1 failed with MemoryError: no memory" in message
    if how == "raises":
        assert results[1][0] == "MemoryError: no memory"


@pytest.mark.distributed
def test_when_a_rank_does_not_come_the_others_do_not_wait_for_ever():
    with closing(Ranks(2)) as ranks:
        (message, seconds), _ = ranks.run(cases.survives, "absent", "forward", may_die=1)
    assert "rank 0 waited to compare arguments in vain" in message
    assert seconds < 10
