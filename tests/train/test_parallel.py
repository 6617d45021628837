"""Training on meshes of processes: the losses, norms and weights of one process."""

import shutil
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emu3.model import Emu3
from emu3.settings import SettingsError, parse
from emu3.train.layout import Batch, ParallelSettings, check_fits
from emu3.train.parallel import _recompute, accumulate_gradients
from emu3.train.sharded import checkpoints
from emu3.weights import load_decoder, official_views
from emu3_kernels.testing.budget import assert_as_accurate
from tests.ranks import Ranks
from tests.train import mesh_cases as cases

WORLD = 4
DTYPES = torch.float32, torch.float64
MESHES = [
    {"replicate": 2, "shard": 2},
    {"context": 2, "tensor": 2, "context_style": "ring"},
    {"shard": 2, "context": 2, "context_style": "ulysses"},
    {"tensor": 4},
]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(WORLD)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone():
    """Of a number of steps in one process: in float32 and in float64."""
    return cache(lambda steps: tuple(cases.train_alone(d, steps) for d in DTYPES))


def check(ranks, alone, sizes, *, steps=3, **settings):
    results = ranks.run(cases.train_on_with, sizes, settings | {"steps": steps})
    results[0].assert_as_accurate(*alone(steps))
    for other in results[1:]:
        assert torch.equal(other.norms, results[0].norms)
        assert all(torch.equal(other.weights[n], w) for n, w in results[0].weights.items())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_trains_as_one_process_does(ranks, alone, sizes):
    """With documents that straddle shards, weighted tokens and dropout of 0.1."""
    check(ranks, alone, sizes)


class Flash(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        q = q.sin()
        whole = None, None, q.shape[1], q.shape[1], 0.0, True, False
        return torch.ops.aten._flash_attention_forward(q, q, q, *whole)[0].sin()


@pytest.mark.parametrize(
    ("recompute", "times"), [("none", 1), ("all", 2), ("all_but_attention", 1)]
)
def test_flash_attention_of_pytorch_is_not_computed_again(recompute, times):
    """On meta tensors, without a GPU."""
    called = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **kwargs or {})

    block = Flash()
    _recompute(block, recompute)
    q = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Counter():
        block(q).sum().backward()
    assert called.count(torch.ops.aten._flash_attention_forward.default) == times


@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_activations_that_are_computed_again_change_nothing(ranks, alone, recompute):
    check(ranks, alone, {"context": 2, "tensor": 2, "recompute": recompute})


@pytest.mark.parametrize("style", ["ulysses", "ring"])
def test_compiled_blocks_train_alike(ranks, alone, style):
    mesh = {"context": 2, "tensor": 2, "context_style": style}
    check(ranks, alone, mesh | {"compile": True}, steps=2)


@pytest.mark.parametrize(
    "sizes", [{"shard": 2, "tensor": 2}, {"replicate": 2, "shard": 2}], ids=str
)
def test_micro_batches_add_up_to_the_batch(ranks, alone, sizes):
    """Replicas exchange gradients in the last alone."""
    check(ranks, alone, sizes, micro_batches=2)


def test_bfloat16_keeps_float32_weights_and_an_unrounded_loss(ranks, alone):
    """Within the rounding of bfloat16; rounding the weights of tokens would be a tenth of it."""
    sizes = {"shard": 2, "tensor": 2, "dtype": "bfloat16"}
    result = ranks.run(cases.train_on_with, sizes, {"steps": 2})[0]
    _, exact = alone(2)
    assert result.weights["model.norm.weight"].dtype == torch.float32
    torch.testing.assert_close(result.losses.double(), exact.losses, rtol=2e-3, atol=0)


def test_a_view_of_a_mesh_has_the_name_and_shape_of_the_official_file(ranks):
    shapes = {name: tuple(view.shape) for name, view in official_views(Emu3(cases.MODEL)).items()}
    for found in ranks.run(cases.view_shapes, {"shard": 2, "tensor": 2}):
        assert found == shapes


def test_a_run_continues_on_another_mesh(ranks, alone, tmp_path):
    """With the moments of its optimizer: their absence would change the losses by a thousandth."""
    first = ranks.run(cases.continued_on, str(tmp_path), {"shard": 2, "tensor": 2}, 2)
    meshes = {"context": 2, "tensor": 2}, {"replicate": 2, "shard": 2}, {"tensor": 4}
    losses = first[0]
    for until, sizes in enumerate(meshes, start=3):
        losses = losses + ranks.run(cases.continued_on, str(tmp_path), sizes, until)[0]
    low, exact = alone(5)
    assert_as_accurate("losses", torch.tensor(losses), low.losses, exact.losses)


def test_a_checkpoint_that_was_not_finished_is_passed_over(ranks, tmp_path):
    mesh = {"shard": 4}
    ranks.run(cases.continued_on, str(tmp_path), mesh, 1)
    whole, torn = tmp_path / "step-1", tmp_path / "step-2.draft"
    shutil.copytree(whole, torn)
    (torn / ".metadata").unlink()
    shutil.copytree(torn, tmp_path / "step-3")
    assert checkpoints(tmp_path) == [whole]
    ranks.run(cases.continued_on, str(tmp_path), mesh, 2)
    ranks.run(cases.continued_on, str(tmp_path), mesh, 3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-3"]
    assert not whole.exists()
    assert not torn.exists()


def test_whole_weights_are_written_and_read_by_any_mesh(ranks, tmp_path):
    """As the file of the official layout that one process reads."""
    meshes = {"shard": 2, "tensor": 2}, {"context": 2, "tensor": 2}
    assert ranks.run(cases.saves_and_loads_whole, str(tmp_path), *meshes) == [[]] * WORLD
    found = load_decoder(tmp_path / "model.safetensors").state_dict()
    expected = cases.new_model().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_number_of_ranks_is_refused(ranks):
    (message, *_) = ranks.run(cases.refusal, {"shard": 3})
    assert message == (
        "parallel: replicate x shard x context x tensor must be the 4 ranks, got 1 x 3 x 1 x 1 = 3"
    )


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        (
            {"tensor": 16},
            48,
            "num_kv_heads must be a multiple of the 16 tensor x context ranks, got 8",
        ),
        ({"context": 16}, 48, "num_kv_heads must be a multiple of the 16 tensor x context ranks"),
        ({"shard": 3}, 48, "hidden_size must be a multiple of the 3 shard x context ranks, got 64"),
        ({"context": 2, "tensor": 2}, 50, "tokens of a row must be a multiple of the 4 context x"),
        ({"context": 4, "context_style": "ring"}, 44, "a multiple of 8, twice the context ranks"),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_refused(sizes, tokens, message):
    with pytest.raises(ValueError, match=f"^parallel: .*{message}"):
        check_fits(ParallelSettings(**sizes), cases.MODEL, tokens)


def test_a_batch_counts_positions_in_each_document_and_shifts_the_rest():
    ids, documents = torch.arange(10, 16)[None], torch.tensor([[0, 0, 0, 1, 1, 5]]).int()
    weights = torch.tensor([[0.0, 1, 1, 0, 1, 0]])
    batch = Batch.of(ids, weights, documents)
    found = [x[0].tolist() for x in batch]
    ahead = [11, 12, 13, 14, 15], [1, 1, 0, 1, 0], [0, 1, 2, 0, 1], [0, 0, 0, 1, 1]
    assert found == [[10, 11, 12, 13, 14], *ahead]


def test_a_model_with_dropout_needs_seeds():
    """Drawn ones would differ between ranks, and in the second pass of recomputed activations."""
    model = cases.new_model()
    with pytest.raises(ValueError, match="parallel: a model with dropout must be given seeds"):
        accumulate_gradients(model, None, [cases.batch_of(0)])


def test_a_ring_does_not_keep_attention_alone():
    with pytest.raises(SettingsError, match="recompute must be none or all with a ring"):
        parse(
            ParallelSettings,
            {"context": 2, "context_style": "ring", "recompute": "all_but_attention"},
        )
