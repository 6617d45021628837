"""What a Hugging Face Emu3 with our ops in it returns in evaluation, and under ``Trainer``."""

import copy

import pytest
import torch

from emu3_kernels.huggingface import apply
from tests.model.test_huggingface import LABELS, TOKENS, multimodal, pair
from tests.model.test_model import hugging_face


@torch.no_grad()
def test_in_evaluation_mode_a_call_with_labels_returns_logits_too():
    """``Trainer.predict`` returned nothing, and metrics had nothing to compute with."""
    ours, theirs, _ = pair()
    assert ours(TOKENS, labels=LABELS).logits is None
    actual, expected = (model.eval()(TOKENS, labels=LABELS) for model in (ours, theirs))
    assert list(actual) == list(expected)
    assert actual.logits.equal(ours(TOKENS).logits)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.loss, expected.loss)


@torch.no_grad()
def test_the_multimodal_model_returns_logits_in_evaluation_mode_too():
    model = apply(multimodal())
    assert model(TOKENS[:, :5], labels=TOKENS[:, :5]).logits is not None
    assert model.train()(TOKENS[:, :5], labels=TOKENS[:, :5]).logits is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("of_call", [{}, {"skip_logits": True}, {"skip_logits": False}])
@torch.no_grad()
def test_logits_are_skipped_where_the_call_or_else_apply_says_so(training, asked, of_call):
    """Without a word of either, in training mode alone, as Liger's models do it."""
    model = apply(hugging_face(), skip_logits=asked).train(training)
    skipped = of_call.get("skip_logits", training if asked is None else asked)
    assert (model(TOKENS, labels=LABELS, **of_call).logits is None) == skipped
    assert model(TOKENS, **of_call).logits is not None


@torch.no_grad()
def test_a_second_apply_may_decide_anew():
    model = apply(apply(hugging_face()), skip_logits=True)
    assert model(TOKENS, labels=LABELS).logits is None
    assert apply(model)(TOKENS, labels=LABELS).logits is not None


def trainer(model, folder, **settings):
    """A ``Trainer`` of three steps on eight rows of unequal numbers of labels."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[::2, :7] = -100
    data = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    of_trainer = {k: settings.pop(k) for k in ("compute_metrics",) if k in settings}
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 1} | settings
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "max_steps": 3}
    arguments = TrainingArguments(folder, save_strategy="no", logging_steps=1, **sizes, **settings)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, **of_trainer)


def both(folder, **settings):
    models = apply(hugging_face()), hugging_face()
    return [trainer(model, folder, **copy.deepcopy(settings)) for model in models]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_trainer_logs_the_losses_that_it_logged(settings, tmp_path):
    losses = []
    for one in both(tmp_path, **settings):
        one.train()
        losses.append([row["loss"] for row in one.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_trainer_predicts_and_computes_metrics(tmp_path):
    def accuracy(predicted):
        hit = predicted.predictions.argmax(-1)[:, :-1] == predicted.label_ids[:, 1:]
        return {"accuracy": hit.mean()}

    ours, theirs = both(tmp_path, compute_metrics=accuracy)
    assert ours.evaluate()["eval_accuracy"] == theirs.evaluate()["eval_accuracy"]
    predictions = [one.predict(one.eval_dataset).predictions for one in (ours, theirs)]
    assert predictions[0] == pytest.approx(predictions[1], abs=1e-4)
