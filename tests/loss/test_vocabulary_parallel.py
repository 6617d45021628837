"""linear_cross_entropy over a group equals one process: 2 and 4 ranks of gloo, uneven shards.

One fixture starts four processes, which run every case; the tests check their results.
"""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from emu3_kernels import linear_cross_entropy as call
from emu3_kernels.ops.loss.chunking import MEMORY, chunking
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, reference, value_and_gradients
from tests.ranks import Ranks

OP = "linear_cross_entropy"
WORLD = 4
PATIENCE = timedelta(seconds=60)
UNEVEN = {(0, 1): (1533, 667), (2, 3): (0, 2200), (0, 1, 2, 3): (600, 0, 1533, 67)}
"""The classes of the ranks of each group: with 1,024 at the least, the largest make two chunks."""
WIDTH, CLASSES = 16, 2200
FEW, MANY = 210, 900
"""Tokens, of which every third is ignored: three chunks of 64, and two of 320."""
SUMMED = 11_150_000
"""Bytes in which the bfloat16 dhead of MANY tokens is added up over chunks of them."""
SETTINGS = {
    "mean": {"weighted": True},
    "none": {"reduction": "none", "weighted": True, "z_loss": 1e-2},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3, "normalizer": 3.5},
}
FLOAT, BFLOAT = torch.float32, torch.bfloat16
CASES = [
    *(("cpu", s, FEW, d, 0, r) for s in SETTINGS for d in (FLOAT, BFLOAT) for r in UNEVEN),
    *(("reference", s, FEW, d, 0, (0, 1, 2, 3)) for s in SETTINGS for d in (FLOAT, BFLOAT)),
    ("cpu", "mean", FEW, BFLOAT, MEMORY, (0, 1, 2, 3)),
    ("cpu", "sum", MANY, BFLOAT, SUMMED, (2, 3)),
]


def shards(head, ranks):
    return dict(zip(ranks, head.split(UNEVEN[ranks]), strict=True))


def make(settings, tokens, dtype):
    size = {"tokens": tokens, "width": WIDTH, "classes": CLASSES, **SETTINGS[settings]}
    return cases(OP).make(**size, dtype=dtype, device="cpu")


def make_small(dtype):
    return cases(OP).make(tokens=9, width=8, classes=20, dtype=dtype, device="cpu")


def on_rank(world):
    """Run every case that this rank takes part in, twice; and the calls that must be refused."""
    rank = world.rank()
    groups = {ranks: dist.new_group(list(ranks), timeout=PATIENCE) for ranks in UNEVEN}
    given = {}
    for case in CASES:
        backend, settings, tokens, dtype, memory, ranks = case
        if rank in ranks:
            options = {"backend": backend, "memory": memory, "group": groups[ranks]}
            inputs = make(settings, tokens, dtype)
            inputs["head"] = shards(inputs["head"], ranks)[rank]
            given[case] = [value_and_gradients(OP, partial(call, **options), inputs) for _ in "12"]
    given["dropped"] = dropped(rank, groups[(0, 1, 2, 3)])
    given["refused"] = list(refused(rank, groups[(0, 1, 2, 3)]))
    given["frozen"] = list(frozen(rank, groups[(0, 1, 2, 3)]))
    return given


def dropped(rank, group):
    inputs = make_small(FLOAT)
    inputs["head"] = inputs["head"][:5]
    inputs["targets"][:] = -100
    return [
        value_and_gradients(OP, partial(call, group=group, backend=backend), inputs)
        for backend in ("cpu", "reference")
    ]


def refused(rank, group):
    hidden, head, targets = torch.randn(3, 8), torch.randn(5, 8), torch.full((3,), 19)
    wrong = {
        "targets": (hidden, head, targets + 1),
        "width": (hidden[:, : 8 - rank], head[:, : 8 - rank], targets),
        "tokens": (hidden[: 1 + rank % 2], head, targets[: 1 + rank % 2]),
        "batch": (hidden, head, targets - rank),
        "gradient": (hidden.detach().requires_grad_(rank == 1), head, targets),
    }
    for name, operands in wrong.items():
        with pytest.raises(ValueError, match=f"{OP}: ") as error:
            call(*operands, group=group)
        yield name, str(error.value)


def frozen(rank, group):
    """The gradient of hidden alone, and of head alone."""
    inputs = make_small(BFLOAT)
    inputs["head"] = inputs["head"].split(5)[rank]
    for name in ("hidden", "head"):
        leaf = inputs[name].detach().requires_grad_()
        loss = call(**inputs | {name: leaf}, group=group)
        dloss = torch.randn((), generator=torch.Generator().manual_seed(1))  # as the suite draws
        loss.backward(dloss.bfloat16().float())
        yield leaf.grad


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD)
    yield started.run(on_rank)
    started.close()


def truth(inputs):
    oracle = partial(value_and_gradients, OP, reference(OP))
    return oracle(inputs), oracle(double(inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_group_gives_what_one_process_gives(case, ranks):
    _, settings, tokens, dtype, _, members = case
    low, exact = truth(make(settings, tokens, dtype))
    for rank in members:
        first, again = ranks[rank][case]
        for value, numbers in first.items():
            assert torch.equal(numbers, again[value]), f"{value} differs from run to run"
            same = value == "dhead" or torch.equal(numbers, ranks[members[0]][case][0][value])
            assert same, f"{value} differs from rank to rank"
    whole = dict(ranks[members[0]][case][0])
    whole["dhead"] = torch.cat([ranks[rank][case][0]["dhead"] for rank in members])
    for value, numbers in whole.items():
        assert_as_accurate(value, numbers, low[value], exact[value])


def test_without_a_valid_token_no_rank_waits(ranks):
    for given in ranks:
        for values in given["dropped"]:
            assert not any(value.any() for value in values.values())


def test_every_rank_refuses_what_no_group_can_compute(ranks):
    for given in ranks:
        refusals = dict(given["refused"])
        assert refusals["targets"].endswith("[0, 20) or equal ignore_index -100, got 20")
        assert "width 8, 7, 6, 5" in refusals["width"]
        assert "number of tokens 1, 2, 1, 2" in refusals["tokens"]
        assert "sum of targets 57, 54, 51, 48" in refusals["batch"]
        assert "gradient of hidden 0, 1, 0, 0" in refusals["gradient"]


def test_one_gradient_alone_is_the_same_gradient(ranks):
    low, exact = truth(make_small(BFLOAT))
    for given in ranks:
        assert_as_accurate("dhidden", given["frozen"][0], low["dhidden"], exact["dhidden"])
    dhead = torch.cat([given["frozen"][1] for given in ranks])
    assert_as_accurate("dhead", dhead, low["dhead"], exact["dhead"])


def test_the_cases_chunk_the_logits_in_every_way():
    """Else the memories above are no longer right."""
    chunkings = set()
    for backend, _, tokens, dtype, memory, ranks in CASES:
        valid, largest = tokens * 2 // 3, max(UNEVEN[ranks])
        chosen = chunking(valid, largest, WIDTH, dtype, memory, wants_head=True)
        if backend == "cpu":
            size = dtype.itemsize
            chunkings.add(
                (size, chosen.tokens < valid, chosen.classes < largest, chosen.sums_dhead)
            )
    assert chunkings == {
        (4, True, False, False),
        (2, False, False, False),
        (2, True, False, True),
        (2, False, True, False),
    }
