"""The optimizer that keeps less: 8-bit moments, weights of bfloat16, and both on the host."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from emu3.settings import SettingsError
from emu3.train import compact_adamw
from emu3.train.compact_adamw import MOMENTS, CompactAdamW, round_at_random
from emu3.train.metrics import read_metrics
from emu3.train.pretrain_loop import pretrain as train
from emu3.train.sharded import checkpoints
from tests.ranks import Ranks
from tests.train.pretraining import (
    Killed,
    assert_same_run,
    before_step,
    killed,
    poisoned,
    tiny,
    write_data,
)

HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
SHAPE = 48, 256
"""Three slices of a test."""
SMALL = (
    "optim.optimizer=adamw8bit",
    "optim.master=stochastic",
    "parallel.dtype=bfloat16",
)


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    monkeypatch.setattr(compact_adamw, "SLICE", 4096)


def compact(parameter: nn.Parameter, *, quantized: bool) -> CompactAdamW:
    group = {"params": [parameter], "weight_decay": 0.1}
    return CompactAdamW([group], **HOW, quantized=quantized)


def torchs(parameter: nn.Parameter) -> torch.optim.AdamW:
    return torch.optim.AdamW([parameter], weight_decay=0.1, **HOW)


def trained(make: Callable, steps: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """Move random weights towards others under noise; return the distance that is left."""
    random = torch.Generator().manual_seed(0)
    weights, target = (torch.randn(SHAPE, generator=random) for _ in range(2))
    parameter = nn.Parameter(weights.to(dtype))
    optimizer = make(parameter)
    for _ in range(steps):
        noise = 0.1 * torch.randn(SHAPE, generator=random)
        parameter.grad = (parameter.detach().float() - target + noise).to(dtype)
        optimizer.step()
    return parameter.detach().float() - target


def test_with_float32_states_it_is_adamw_of_torch():
    found, expected = trained(lambda p: compact(p, quantized=False)), trained(torchs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_moments_of_8_bits_train_nearly_as_those_of_float32():
    found, expected = trained(lambda p: compact(p, quantized=True)), trained(torchs)
    assert found.norm() == pytest.approx(expected.norm().item(), rel=0.01)
    assert not torch.equal(found, expected)


def test_moments_of_8_bits_survive_being_read_and_written_bit_for_bit():
    """Also of blocks whose largest number is negative: a map without -1 would shrink them."""
    parameter = nn.Parameter(torch.zeros(SHAPE))
    optimizer = compact(parameter, quantized=True)
    parameter.grad = -torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state[parameter]
    assert sum(t.codes.numel() + 4 * t.scale.numel() for t in map(state.get, MOMENTS)) < 2.1 * (
        parameter.numel()
    )
    for moment in MOMENTS:
        before = state[moment].codes.clone(), state[moment].scale.clone()
        values = optimizer.read(parameter, moment)
        optimizer.write(parameter, moment, values)
        after = state[moment].codes, state[moment].scale
        assert all(map(torch.equal, before, after))
        assert torch.equal(optimizer.read(parameter, moment), values)


def test_rounding_at_random_takes_a_neighbour_and_keeps_the_mean():
    x = torch.tensor([1.001, -1.001, 3e-5, 1.0]).repeat_interleave(1 << 14)
    rounded = round_at_random(x, torch.Generator().manual_seed(0)).float().view(4, -1)
    for given, found in zip(x.view(4, -1), rounded, strict=True):
        assert ((found - given).abs() < given.abs() / 128).all()
        assert found.unique().numel() == (1 if given[0] == 1 else 2)
        assert found.mean().item() == pytest.approx(given[0].item(), rel=2e-4)


def test_bfloat16_weights_learn_from_updates_below_their_rounding():
    """Each is a fortieth of the distance of two numbers; to the nearest, none would move."""
    parameter = nn.Parameter(torch.full(SHAPE, 1.0, dtype=torch.bfloat16))
    group = {"params": [parameter], "weight_decay": 0.0}
    optimizer = CompactAdamW([group], **HOW | {"lr": 1e-4}, quantized=False)
    for step in range(20):
        parameter.grad, optimizer.seed = torch.ones_like(parameter), step
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    moved = 1 - parameter.detach().double().mean().item()
    assert moved == pytest.approx(20e-4, rel=0.05)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_step_that_is_skipped_changes_nothing(quantized):
    parameter = nn.Parameter(torch.randn(SHAPE).bfloat16())
    optimizer = compact(parameter, quantized=quantized)
    parameter.grad = torch.randn(SHAPE).bfloat16()
    optimizer.step()

    def kept() -> list[Tensor]:
        step = optimizer.state[parameter]["step"].clone()
        moments = [optimizer.read(parameter, moment) for moment in MOMENTS]
        return [parameter.detach().clone(), step, *moments]

    before = kept()
    parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, kept()))
    optimizer.found_inf = torch.tensor(0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(map(torch.equal, before, kept()))


def test_without_torchao_it_is_refused_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ValueError, match=r"^train: optim.optimizer=adamw8bit needs torchao \(pip"):
        compact(nn.Parameter(torch.zeros(SHAPE)), quantized=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compact")
    write_data(folder)
    return folder


def test_a_small_run_learns_and_continues_as_if_it_never_stopped(folder, tmp_path, monkeypatch):
    """Bit for bit: rounding, 8-bit moments, weights of bfloat16, gradients of micro-batches."""
    words = *SMALL, "train.micro_batch_size=2", "train.steps=4"
    weights = train(tiny(folder, *words), tmp_path / "whole")
    losses = [step["loss"] for step in read_metrics(tmp_path / "whole/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    before_step(monkeypatch, 3, killed)
    with pytest.raises(Killed):
        train(tiny(folder, *words), tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-2"]
    train(tiny(folder, *words), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_small_run_skips_a_step_that_is_not_finite(folder, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2})
    train(tiny(folder, *SMALL, "train.steps=4"), tmp_path)
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["skipped"] for step in steps] == [0, 0, 1, 1]
    assert steps[3]["loss"] < steps[0]["loss"]


def test_what_is_offloaded_trains_alike_and_may_change_when_a_run_continues(
    folder, tmp_path, monkeypatch
):
    """On a CPU both are one memory; the way of weights and gradients is another."""
    short = "train.steps=4", "evaluation.every=9"
    train(tiny(folder, *short), tmp_path / "whole")
    before_step(monkeypatch, 3, killed)
    with pytest.raises(Killed):
        train(tiny(folder, *short, "parallel.offload=true"), tmp_path / "run")
    monkeypatch.undo()
    train(tiny(folder, *short), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def on_rank(_group, folder: str, out: str, words: tuple[str, ...]) -> None:
    train(tiny(Path(folder), *words), Path(out))


@pytest.mark.distributed
@pytest.mark.parametrize(("words", "loss", "mean"), [(SMALL[:1], 1e-5, 1e-4), (SMALL, 2e-4, 4e-4)])
def test_two_processes_make_the_small_run_of_one(ranks, folder, tmp_path, words, loss, mean):
    """On shards other numbers share a scale, and are rounded up.

    Of the weights, which three steps move by up to 3e-3 each, the mean error counts.
    """
    words = *words, "train.steps=4"
    alone = train(tiny(folder, *words), tmp_path / "alone")
    ranks.run(on_rank, str(folder), str(tmp_path / "two"), (*words, "parallel.shard=2"))
    runs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "alone"))
    for a, b in zip(*runs, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
    found, expected = load_file(tmp_path / "two" / alone.name), load_file(alone)
    errors = [(found[name].float() - expected[name].float()).abs() for name in expected]
    assert torch.cat([error.flatten() for error in errors]).mean() < mean


def test_rounding_needs_weights_of_bfloat16(folder):
    with pytest.raises(SettingsError, match=r"optim.master=stochastic needs parallel.dtype=bfl"):
        tiny(folder, "optim.master=stochastic")
