"""The benchmark of the whole step: everyone does the same work, on miniatures."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import machine, model, report
from benchmarks.contestants import Case
from benchmarks.test_ops import row
from tests.model.tiny import TINY

NUM_TOKENS, COUNTED = 40, 23


@pytest.fixture(scope="module")
def entrants():
    return {name: (module, loss) for name, module, loss in model.contestants(TINY)}


def test_everyone_computes_the_same_loss_of_the_tokens_that_count(entrants):
    tokens, weights = model.drawn(TINY, NUM_TOKENS, seed=1), torch.ones(1, NUM_TOKENS)
    weights[:, :-COUNTED] = 0
    losses = {name: loss(tokens, weights).item() for name, (_, loss) in entrants.items()}
    assert list(losses) == [model.OURS, model.THEIRS, model.APPLIED]
    same = [losses[model.THEIRS]] * 3
    assert list(losses.values()) == pytest.approx(same, rel=model.SAME_LOSS)
    _, loss = entrants[model.OURS]
    assert abs(loss(tokens, torch.ones(1, NUM_TOKENS)).item() / same[0] - 1) > model.SAME_LOSS


def test_theirs_turns_by_frequencies_in_float32(entrants):
    module, _ = entrants[model.THEIRS]
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_memory_stands_above_weights_and_gradients(monkeypatch):
    """A sum over 4 MiB of weights holds nothing but their gradient."""
    layer = nn.Linear(1024, 1024, bias=False)
    entrant = (model.OURS, layer, lambda tokens, weights: layer.weight.sum())
    monkeypatch.setattr(model, "contestants", lambda settings: [entrant])
    held = model.lineup(TINY, NUM_TOKENS, COUNTED).peak_mib[model.OURS]
    assert held == pytest.approx(0, abs=0.01)
    assert layer.weight.grad is None


def test_a_contestant_that_loses_something_else_is_not_timed(monkeypatch):
    right = model.labelled
    monkeypatch.setattr(model, "labelled", lambda *args: 1.01 * right(*args))
    lineup = model.lineup(TINY, NUM_TOKENS, COUNTED)
    assert set(lineup.calls) == {model.OURS, model.MULTIPLY}
    assert "its loss is" in lineup.missing[model.THEIRS]


def test_the_bound_counts_every_matrix_three_times_and_the_head_for_tokens_that_count():
    module = model.emu3(TINY, model.hugging_face(TINY))
    head = module.head.weight.numel()
    matrices = sum(p.numel() for p in module.blocks.parameters() if p.dim() == 2)
    counted = model.flops(TINY, NUM_TOKENS, COUNTED)
    assert counted == 6 * (NUM_TOKENS * matrices + COUNTED * head)
    bound = model.bound(2 * model.MATRIX**3, [2.0, 4.0], [1.0, 3.0])
    assert bound["fraction"] == 0.625


def test_training_starts_from_the_same_weights_and_reaches_the_same_loss():
    start = model.after_steps(TINY, NUM_TOKENS, 1)["losses"]
    end = model.after_steps(TINY, NUM_TOKENS, 6)["losses"]
    for losses in (start, end):
        assert list(losses.values()) == pytest.approx(
            [losses[model.THEIRS]] * 3, rel=model.SAME_LOSS
        )
    assert end[model.OURS] < start[model.OURS] - 0.1


def test_a_report_shows_tokens_a_second_memory_and_losses():
    taken = {model.OURS: [0.5], model.THEIRS: [2.0]}
    lineup = model.Lineup(peak_mib={model.OURS: 100.0, model.THEIRS: 900.0})
    case = Case("model", model.OURS, {"tokens": 8}, torch.bfloat16, "forward+backward")
    written = row(case, 1, [0.0, 0.0], lineup, taken)
    after = {"steps": 5, "losses": {model.OURS: 1.25, model.THEIRS: 1.5}}
    page = report.section("model", [written | {"tokens_per_s": 16.0, "after_steps": after}])
    assert "16 tokens/s" in page
    assert "4.00x (4.00-4.00) 900 MiB" in page
    assert "Loss after 5 steps of AdamW: emu3.Emu3 1.2500, Hugging Face 1.5000." in page


def test_a_busy_machine_times_no_model(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: machine.cores() + 0.1)
    monkeypatch.setattr(front, "run_pytest", lambda *args: pytest.fail("timed under load"))
    refused = CliRunner().invoke(front.app, ["model"])
    assert refused.exit_code == 1
    assert "the load average must be at most" in refused.output


def test_the_command_passes_its_options_to_the_suite(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    monkeypatch.setattr(front, "run_pytest", lambda *args: seen.append(args) or 1)
    CliRunner().invoke(front.app, ["model", "--threads", "1", "--steps", "7", "--seconds", "3"])
    assert [(op, threads, seconds, steps) for op, threads, seconds, _, steps in seen] == [
        ("model", 1, 3.0, 7)
    ]
