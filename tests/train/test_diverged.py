"""A run that diverges ends, and its last good checkpoint stays."""

import json
import math

import pytest
import torch

from emu3.tasks import TASKS, load_recipe
from emu3.train import checkpoint, loop
from emu3.weights import read_tensors
from tests.train.recipes import VISION_WORDS, tiny_recipe

FAULTY = 5
"""Step that diverges; with ``save_every`` 2 the last good state is that after 4."""


def diverging(stage_name, fault):
    """A builder of the stage whose step ``FAULTY`` ends in ``fault(stage, metrics)``."""

    def build(recipe):
        stage = TASKS[stage_name].build(recipe)
        real = stage.step

        def step(number, *batch):
            metrics = real(number, *batch)
            return fault(stage, metrics) if number == FAULTY else metrics

        stage.step = step
        return stage

    return build


def with_metric(name, value):
    return lambda stage, metrics: {**metrics, name: torch.tensor(value)}


def with_bad_tensor(part, name, value):
    """Metrics that look well, and a state that is not."""

    def fault(stage, metrics):
        tensor = stage.modules[part].state_dict()[name]
        tensor[(-1,) * tensor.ndim] = value
        return metrics

    return fault


def with_bad_moment(stage, metrics):
    moment = next(iter(stage.optimizer.state.values()))["exp_avg_sq"]
    moment[(0,) * moment.ndim] = math.inf
    return metrics


FAULTS = {
    "loss": ("vision", with_metric("loss", math.nan), "loss must be finite, got nan"),
    "norm": ("vision", with_metric("grad_norm", math.inf), "grad_norm must be finite, got inf"),
    "weight": (
        "decoder",
        with_bad_tensor("model", "head.weight", math.nan),
        "model.head.weight must be finite",
    ),
    "moment": ("vision", with_bad_moment, r"optimizer.0.exp_avg_sq must be finite"),
    "codebook": (
        "vision",
        with_bad_tensor("model", "quantize.sums", math.inf),
        "model.quantize.sums must be finite",
    ),
    "discriminator": (
        "tokenizer",
        with_bad_tensor("discriminator", "body.0.weight", math.nan),
        "discriminator.body.0.weight must be finite",
    ),
    "average": (
        "tokenizer",
        with_bad_tensor("average", "module.decoder.conv_out.bias", math.nan),
        "average.module.decoder.conv_out.bias must be finite",
    ),
}


@pytest.mark.parametrize(("stage", "fault", "line"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_finite_ends_the_run_in_a_line_and_is_not_saved(stage, fault, line, tmp_path):
    """The run went on in NaN, replaced its last good checkpoint and wrote weights of NaN."""
    recipe, folder = tiny_recipe(stage, tmp_path), tmp_path / "run"
    with pytest.raises(ValueError, match=rf"^train: step {FAULTY}: {line}") as ended:
        loop.train(recipe, folder, diverging(stage, fault))
    assert "\n" not in str(ended.value)
    assert not (folder / f"{stage}.safetensors").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(value) for line in lines for value in json.loads(line).values())
    tensors, metadata = read_tensors(folder / checkpoint.FILE)
    assert metadata["step"] == "4"
    assert all(value.isfinite().all() for value in tensors.values())


def test_the_state_before_a_run_diverged_is_resumed_to_the_unbroken_run_s_bytes(tmp_path):
    recipe, build = tiny_recipe("vision", tmp_path), TASKS["vision"].build
    with pytest.raises(ValueError, match="loss must be finite"):
        loop.train(recipe, tmp_path / "run", diverging(*FAULTS["loss"][:2]))
    resumed = loop.train(recipe, tmp_path / "run", build, resume=True)
    unbroken = loop.train(recipe, tmp_path / "unbroken", build)
    assert resumed.read_bytes() == unbroken.read_bytes()


def test_a_rate_far_too_high_ends_the_run_with_its_last_finite_state(tmp_path):
    words = [*VISION_WORDS, "optim.lr=1e9", "optim.warmup_steps=8", "train.save_every=1"]
    recipe, build = load_recipe("vision", words), TASKS["vision"].build
    with pytest.raises(ValueError, match=r"^train: step \d+: \S+ must be finite") as first:
        loop.train(recipe, tmp_path, build)
    assert not (tmp_path / "vision.safetensors").exists()
    assert (tmp_path / checkpoint.FILE).exists()
    with pytest.raises(ValueError, match=r"^train: step \d+: \S+ must be finite") as again:
        loop.train(recipe, tmp_path, build, resume=True)
    assert str(again.value) == str(first.value)
