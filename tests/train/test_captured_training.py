"""Training on a GPU without a wait for it in every step: CUDA graphs, and metrics read together."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from emu3.train import loop, objective, stage
from emu3.train.metrics import numbers_of
from emu3.train.stage import SingleLossStage
from emu3_kernels.ops.loss import token_loss
from tests.model.tiny import tiny_model
from tests.recorded_graph import Refused, recorded_graphs
from tests.train.recipes import tiny_recipe

STEPS = 6


def loss_of(model, tokens):
    logits = model.head(model(tokens[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {"tokens": 1}


def own_loss_of(model, tokens):
    weights = (torch.arange(tokens.numel()).view_as(tokens) % 3).float()
    return objective.next_token_of_all(model, tokens, weights)


def trained(loss, recipe):
    """Metrics of every step, and the weights after them; dropout draws its masks anew."""
    model = tiny_model(dropout=0.2).train()
    one = SingleLossStage(recipe, model, None, loss, None, cuda_graph=True)
    random = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    batches = [torch.randint(256, (2, 9), generator=random) for _ in range(STEPS)]
    metrics = numbers_of([one.step(step, batch) for step, batch in enumerate(batches)])
    return metrics, model.state_dict()


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe("decoder", tmp_path)


@pytest.mark.parametrize("loss", [loss_of, own_loss_of])
def test_replayed_training_steps_are_those_that_run_bit_for_bit(monkeypatch, recipe, loss):
    # A call on a GPU asserts there what one on a CPU reads and raises.
    monkeypatch.setattr(token_loss, "check_values", lambda *args: None)
    with recorded_graphs(monkeypatch) as counts:
        metrics, weights = trained(loss, recipe)
    assert (counts.captures, counts.replays) == (1, STEPS - 1)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "CapturedStep", lambda step, device: step)
        expected, expected_weights = trained(loss, recipe)
    assert metrics == expected
    assert len({line["loss"] for line in metrics}) == STEPS
    assert len({line["lr"] for line in metrics}) > 2
    assert all(weights[name].equal(value) for name, value in expected_weights.items())


def test_a_loss_that_reads_from_the_gpu_is_not_captured(monkeypatch, recipe):
    def reading(model, tokens):
        loss, metrics = loss_of(model, tokens)
        return loss, metrics | {"shown": loss.item()}

    with recorded_graphs(monkeypatch), pytest.raises(Refused):
        trained(reading, recipe)


class Falling:
    """A stage without a model: its loss is 1 / (step + 1), and NaN in the step ``bad``."""

    modules, optimizers = {}, {}
    stream = SimpleNamespace(next_batch=tuple, state=dict)

    def __init__(self, bad=None):
        self.bad = bad

    def step(self, step):
        return {"loss": torch.tensor(torch.nan if step == self.bad else 1 / (step + 1))}

    def save(self, path):
        path.touch()


@pytest.fixture
def read_late(monkeypatch, recipe):
    """A recipe whose steps are logged now and then, and how many steps each read had."""
    monkeypatch.setattr(loop, "are_on_gpu", lambda metrics: True)
    reads = []
    counted = lambda steps: (reads.append(len(steps)), numbers_of(steps))[1]  # noqa: E731
    monkeypatch.setattr(loop, "numbers_of", counted)
    settings = recipe.train.model_copy(update={"log_every": 3, "save_every": 5})
    return recipe.model_copy(update={"train": settings}), reads


def test_metrics_are_read_when_they_are_logged_or_saved(read_late, tmp_path):
    """Each was read in each step, for which the host waited on a GPU: four times a step."""
    recipe, reads = read_late
    loop.train(recipe, tmp_path / "run", lambda recipe: Falling())
    assert reads == [1, 3, 1, 2, 2]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    expected = [{"step": step, "loss": float(torch.tensor(1 / (step + 1)))} for step in (0, 3, 6)]
    assert list(map(json.loads, lines)) == expected


def test_a_step_that_was_read_later_is_named(read_late, tmp_path):
    recipe, reads = read_late
    with pytest.raises(ValueError, match=r"^train: step 2: loss must be finite, got nan"):
        loop.train(recipe, tmp_path / "run", lambda recipe: Falling(bad=2))
    assert reads == [1, 3]


def test_metrics_of_all_steps_take_one_read(monkeypatch):
    bfloat16, exact = torch.tensor(1 / 3).bfloat16(), torch.tensor(1 / 3, dtype=torch.float64)
    steps = [{"loss": torch.tensor(0.1), "lr": 0.5, "norm": bfloat16}, {"loss": exact, "n": 7}]
    expected = [{n: float(v) for n, v in metrics.items()} for metrics in steps]
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t), tolist(t))[1])
    assert numbers_of(steps) == expected
    assert len(reads) == 1
