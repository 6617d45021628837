"""The schedule, the groups and the clipped step."""

import math

import pytest
import torch
from torch import nn

from emu3.config import OptimSettings, SettingsError
from emu3.tasks import load_recipe
from emu3.train.optim import build_optimizer, learning_rate, take_step

SETTINGS = OptimSettings(lr=1.0, min_lr=0.1, warmup_steps=4, weight_decay=0.5, clip=2.0)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    rates = [learning_rate(step, 14, SETTINGS) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert math.isclose(rates[9], 0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0.1
    assert math.isclose(learning_rate(14, 14, SETTINGS), 0.1)


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    assert learning_rate(3, 4, SETTINGS) == 1.0


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lr=inf", "optim.lr: Input should be a finite number, got inf"),
        ("optim.lr=nan", "optim.lr: Input should be a finite number, got nan"),
        ("optim.lr=-1e-3", "optim.lr: Input should be greater than 0, got -0.001"),
        ("optim.min_lr=inf", "optim.min_lr: Input should be a finite number, got inf"),
        ("optim.min_lr=0.5", "optim: min_lr (0.5) must be at most lr (0.002)"),
        ("optim.clip=nan", "optim.clip: Input should be a finite number, got nan"),
        ("optim.weight_decay=inf", "optim.weight_decay: Input should be a finite number"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1: Input should be less than 1, got 1.5"),
        ("optim.betas=[-0.1, 0.9]", "optim.betas.0: Input should be greater than or equal to 0"),
        ("train.vision_weight=nan", "train.vision_weight: Input should be a finite number"),
        ("vision.commitment=inf", "vision.commitment: Input should be a finite number"),
        ("model.rope_theta=inf", "model.rope_theta: Input should be a finite number"),
        ("data.rotate=inf", "data.rotate: Input should be a finite number"),
        ("objective.adversarial_weight=inf", "objective.adversarial_weight: Input should be a fin"),
    ],
)
def test_a_rate_or_weight_that_is_no_number_is_refused_by_the_settings(word, line):
    """``optim.lr=inf`` trained to NaN, a beta of 1.5 was an error of PyTorch's."""
    with pytest.raises(SettingsError) as fault:
        load_recipe("vision", [word])
    assert line in str(fault.value)


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, spared = build_optimizer(model, SETTINGS).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert len(spared["params"]) == 3


def test_a_step_clips_all_gradients_together_and_tells_their_norm():
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, SETTINGS)
    norm = take_step(model, optimizer, model(torch.tensor([[30.0, 40.0]])).sum(), 0.0, SETTINGS)
    assert norm == 50
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.2, 1.6]]))
