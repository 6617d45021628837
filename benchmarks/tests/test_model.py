"""The benchmark of the training step: every entry does the same work, on tiny models."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, run
from benchmarks.harness.bounds import GEMMS
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.rows import row_of
from benchmarks.report import pages
from benchmarks.suites import model
from emu3.config import BYTE_VOCABULARY, ModelSettings

NUM_TOKENS, NUM_VALID = 40, 23
TINY = ModelSettings(
    vocabulary=BYTE_VOCABULARY,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    max_position_embeddings=128,
    dropout=0.0,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def everyone():
    return model.trained_models(TINY, torch.bfloat16)


def test_every_entry_has_the_same_loss_on_the_valid_tokens(everyone):
    tokens, weights = model.random_tokens(TINY, NUM_TOKENS, seed=1), torch.ones(1, NUM_TOKENS)
    weights[:, :-NUM_VALID] = 0
    losses = {name: loss(m, tokens, weights).item() for name, m, loss in everyone}
    assert list(losses) == [model.OURS, model.THEIRS, model.APPLIED]
    same = [losses[model.THEIRS]] * 3
    assert list(losses.values()) == pytest.approx(same, rel=model.SAME_LOSS)
    _, ours, loss = everyone[0]
    assert abs(loss(ours, tokens, torch.ones(1, NUM_TOKENS)).item() / same[0] - 1) > model.SAME_LOSS


def test_rotary_frequencies_of_hugging_face_are_float32(everyone):
    module = everyone[1].model
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_memory_is_that_above_weights_and_gradients():
    """A sum over 4 MiB of weights holds nothing but their gradient."""
    layer = nn.Linear(1024, 1024, bias=False)
    trained = model.Trained(model.OURS, layer, lambda layer, tokens, weights: layer.weight.sum())
    held = model.entries_of([trained], TINY, NUM_TOKENS, NUM_VALID).peak_mib[model.OURS]
    assert held == pytest.approx(0, abs=0.01)
    assert layer.weight.grad is None


def test_a_peer_with_another_loss_is_not_timed(everyone):
    ours, theirs, _ = everyone
    wrong = theirs._replace(loss=lambda *args: 1.01 * model.labelled(*args))
    entries = model.entries_of([ours, wrong], TINY, NUM_TOKENS, NUM_VALID)
    assert set(entries.calls) == {model.OURS, GEMMS}
    assert "its loss is" in entries.missing[model.THEIRS]


class Gemms(TorchFunctionMode):
    """Adds up the FLOPs of every torch.mm."""

    flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.mm:
            (rows, inner), (_, columns) = (matrix.shape for matrix in args)
            self.flops += 2 * rows * inner * columns
        return function(*args, **(kwargs or {}))


def test_the_bound_counts_every_gemm_three_times_and_the_head_for_valid_tokens():
    module = model.emu3(TINY, model.hugging_face(TINY, torch.bfloat16))
    head = module.head.weight.numel()
    matrices = sum(p.numel() for p in module.blocks.parameters() if p.dim() == 2)
    shapes = model.gemm_shapes(TINY, NUM_TOKENS, NUM_VALID)
    assert model.flops(shapes) == 6 * (NUM_TOKENS * matrices + NUM_VALID * head)
    with Gemms() as multiplied:
        model.gemms(shapes, torch.bfloat16)()
    assert multiplied.flops == model.flops(shapes)


TAKEN = {model.OURS: [0.5, 0.7], model.THEIRS: [2.0, 2.1], GEMMS: [0.4, 0.5]}


def test_the_bound_is_the_time_of_the_gemms_in_the_same_rounds():
    bound = model.bound(model.gemm_shapes(TINY, NUM_TOKENS, NUM_VALID), TAKEN)
    assert bound["ms"] == pytest.approx(450)
    assert bound["fraction"] == pytest.approx((0.4 / 0.5 + 0.5 / 0.7) / 2)
    assert bound["ceilings"] == {model.THEIRS: pytest.approx((2.0 / 0.4 + 2.1 / 0.5) / 2)}
    outside = model.outside(TAKEN)
    assert outside == {model.OURS: pytest.approx(0.15), model.THEIRS: pytest.approx(1.6)}


def test_training_starts_from_the_same_weights_and_reaches_the_same_loss(everyone):
    start = model.after_steps(everyone, TINY, NUM_TOKENS, 1)["losses"]
    end = model.after_steps(everyone, TINY, NUM_TOKENS, 6)["losses"]
    for losses in (start, end):
        assert list(losses) == [model.OURS, model.THEIRS]
        assert losses[model.OURS] == pytest.approx(losses[model.THEIRS], rel=model.SAME_LOSS)
    assert end[model.OURS] < start[model.OURS] - 0.1
    again = model.after_steps(everyone, TINY, NUM_TOKENS, 1)["losses"]
    assert again == pytest.approx(start)  # copies were trained


def published(ours_mib: float, ours_loss: float) -> dict:
    """A row of the whole step, as the suite writes it."""
    peaks = {model.OURS: ours_mib, model.THEIRS: 900.0}
    size = {"tokens": 2048, "valid": 2048}
    case = Case("model", model.OURS, size, torch.bfloat16, "forward+backward")
    bound = model.bound(model.gemm_shapes(TINY, NUM_TOKENS, NUM_VALID), TAKEN)
    written = row_of(case, 1, [0.0, 0.0], Entries(peak_mib=peaks), TAKEN, bound)
    losses = {model.OURS: ours_loss, model.THEIRS: 1.5}
    after = {"steps": 5, "tokens": 512, "losses": losses}
    written["peers"][model.THEIRS]["tokens_per_s"] = 4.0
    more = {"tokens_per_s": 16.0, "after_steps": after, "outside_s": model.outside(TAKEN)}
    return written | more


def test_a_page_shows_tokens_per_second_memory_bound_and_losses():
    page = pages.section("model", [published(100.0, 1.25)])
    assert "16 tokens/s" in page
    assert "3.50x (3.00-4.00)" in page
    assert "| 900.0 |" in page
    assert "take 0.45 s. MEASURED outside them: emu3.Emu3 0.15 s, Hugging Face 1.60 s." in page
    assert "the GEMMs alone are faster by Hugging Face 4.60x" in page
    assert "loss after 5 AdamW steps of 512 tokens: emu3.Emu3 1.2500, Hugging Face 1.5" in page


def test_the_step_has_targets_of_time_memory_and_loss():
    kept = verdicts_of(published(ours_mib=225.0, ours_loss=1.5 * 1.004))
    assert kept == {"time": "reached", "memory": "reached", "loss": "reached"}
    missed = verdicts_of(published(ours_mib=226.0, ours_loss=1.5 * 0.994))
    assert missed == {"time": "reached", "memory": "**missed**", "loss": "**missed**"}


def verdicts_of(written: dict) -> dict[str, str]:
    lines = "".join(pages.targets([written])).splitlines()
    cells = [line.split(" | ") for line in lines if "2048" in line]
    return {line[1]: line[-1].strip(" |") for line in cells if line[0] == "| model"}


def test_a_busy_machine_times_no_model(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    refused = CliRunner().invoke(front.app, ["model"])
    assert refused.exit_code == 1
    assert "the load average must be at most" in refused.output


def test_the_command_passes_its_options_to_the_suite(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    monkeypatch.setattr(run, "run_pytest", lambda asked, stored: seen.append(asked) or 1)
    CliRunner().invoke(front.app, ["model", "--threads", "1", "--steps", "7", "--seconds", "3"])
    (asked,) = seen
    assert asked.arguments()[:3] == ["--op=model", "--threads=1", "--seconds=3.0"]
    assert {"--steps=7", "--step-tokens=256"} <= set(asked.arguments())
