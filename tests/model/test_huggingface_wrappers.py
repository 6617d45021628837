"""A Hugging Face Emu3 with our ops in it under what others wrap around models and their parts."""

import copy
import io
import sys
from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from emu3_kernels import record_backends
from emu3_kernels.huggingface import apply
from emu3_kernels.runtime import gemm
from tests.model.test_huggingface import LABELS, TOKENS, pair
from tests.model.test_model import hugging_face


def replica(model: nn.Module, monkeypatch) -> nn.Module:
    """``nn.parallel.replicate``, but on one CPU, with zeros in place of every tensor's copy."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[torch.zeros_like(x) for x in tensors]],
    )
    return replicate.replicate(model, [0])[0]


def shallow_copy(model: nn.Module, _) -> nn.Module:
    """``copy.copy`` of every part, with zeros in place of every parameter."""
    copies = {part: copy.copy(part) for part in model.modules()}
    for part, other in copies.items():
        other._modules = {name: copies[child] for name, child in part._modules.items()}
        other._parameters = {
            name: None if p is None else torch.zeros_like(p) for name, p in part._parameters.items()
        }
    return copies[model]


@pytest.mark.parametrize("copied", [replica, shallow_copy])
@torch.no_grad()
def test_a_shallow_copy_computes_with_its_own_weights(copied, monkeypatch):
    """A method bound to the original was copied with its attributes, and ran on its weights."""
    ours, theirs, _ = pair()
    for model in (theirs, ours):
        other = copied(model, monkeypatch)
        assert not other(TOKENS).logits.any()
        assert other(TOKENS, labels=LABELS).loss.allclose(torch.tensor(model.vocab_size).log())
    assert other(TOKENS, labels=LABELS).logits is None


def test_the_loss_takes_the_number_of_items_that_data_parallel_scatters():
    """``Trainer`` expands it to a row for each device: ``[1, 1]`` on each replica."""
    ours, theirs, _ = pair()
    settings = {"labels": LABELS, "num_items_in_batch": torch.tensor([[11]])}
    actual, expected = (model(TOKENS, **settings).loss for model in (ours, theirs))
    torch.testing.assert_close(actual, expected.squeeze())


def test_a_saved_model_loads_as_transformers_made_it():
    ours, theirs, _ = pair()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in theirs.modules()]
    assert again(TOKENS).logits.equal(theirs(TOKENS).logits)


def on_meta(weights: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(weight.to("meta")) for name, weight in weights.items()}


def offloaded(model: nn.Module) -> nn.Module:
    """As ``accelerate.cpu_offload``: weights are on meta, and here while a part is called."""
    for part in model.modules():
        weights = {name: p for name, p in part._parameters.items() if p is not None}
        if weights:
            part._hf_hook, part._old_forward = weights, part.forward
            part.forward = update_wrapper(partial(with_weights, part), part._old_forward)
            part._parameters.update(on_meta(weights))
    return model


def with_weights(part: nn.Module, *args, **kwargs):
    part._parameters.update(part._hf_hook)
    output = part._old_forward(*args, **kwargs)
    part._parameters.update(on_meta(part._hf_hook))
    return output


def without_hooks(model: nn.Module) -> nn.Module:
    """As ``accelerate.hooks.remove_hook_from_submodules``: the method stays among attributes."""
    for part in model.modules():
        if hasattr(part, "_hf_hook"):
            part._parameters.update(part._hf_hook)
            part.forward = part._old_forward
            del part._hf_hook, part._old_forward
    return model


def offloaded_by_accelerate(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


OFFLOADS = (offloaded, offloaded_by_accelerate)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that both give the same logits and loss, in training mode and in evaluation mode."""
    for mode in (True, False):
        for model in (actual, expected):
            model.train(mode)
        a, b = (model(TOKENS).logits for model in (actual, expected))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        a, b = (model(TOKENS, labels=LABELS).loss for model in (actual, expected))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_weights_may_be_offloaded_after_apply(offload):
    """The fused norm read weights that lay on meta, since no hook of PyTorch was there."""
    ours, theirs, _ = pair()
    assert_same(offload(ours), theirs)


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_weights_may_be_offloaded_before_apply(offload):
    """Models loaded with a ``device_map`` were refused in nine lines."""
    ours = apply(offload(hugging_face()))
    with record_backends() as ran:
        assert_same(ours, hugging_face())
    assert set(ran) == {"rms_norm", "swiglu", "rope"}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("slow", [True, False])
@torch.no_grad()
def test_a_head_may_be_offloaded_alone(offload, slow, monkeypatch):
    """Where heads are ours, accelerate's wrapper looked like ours too."""
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", slow)
    ours, theirs, _ = pair()
    offload(ours.lm_head)
    assert_same(ours, theirs)


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_all_ops_run_again_once_the_hooks_of_accelerate_are_removed(before):
    ours = apply(offloaded(hugging_face())) if before else offloaded(apply(hugging_face()))
    assert_same(without_hooks(ours), hugging_face())
    with record_backends() as ran:
        assert ours.train()(TOKENS, labels=LABELS).logits is None
    assert {"add_rms_norm", "linear_cross_entropy"} <= set(ran)


@torch.no_grad()
def test_apply_goes_on_where_hooks_were_removed_before():
    """Their removal leaves the class's own method among the attributes of the instance."""
    theirs = without_hooks(offloaded(hugging_face()))
    assert "forward" in vars(theirs.lm_head)
    ours = apply(theirs).train()
    assert ours(TOKENS, labels=LABELS).logits is None
    assert "forward" not in vars(ours.model.norm)


def in_float32(forward: Callable) -> Callable:
    """As ``Accelerator.prepare`` wraps a model under mixed precision."""

    @wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapped


def test_mixed_precision_may_be_unwrapped():
    """``unwrap_model(keep_fp32_wrapper=False)`` unwraps ``forward`` to its end."""
    ours, _, _ = pair()
    loss = ours(TOKENS, labels=LABELS).loss
    ours.forward = MethodType(in_float32(ours.forward.__func__), ours)
    assert ours(TOKENS, labels=LABELS).loss.equal(loss)
    forward = ours.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    ours.forward = MethodType(forward, ours)
    output = ours(TOKENS, labels=LABELS)
    assert output.logits is None
    assert output.loss.equal(loss)


def test_a_patch_that_is_no_hook_is_refused_in_one_line():
    model = hugging_face()
    model.forward = MethodType(in_float32(model.forward.__func__), model)
    with pytest.raises(ValueError, match=r"own, got .*: apply before accelerate's prepare") as e:
        apply(model)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("part", ["lm_head", "post_attention_layernorm", "act_fn"])
def test_a_forward_pass_that_others_replace_later_is_called(part):
    ours, theirs, _ = pair()
    for model in (ours, theirs):
        for name, module in model.named_modules():
            if name.endswith(part):
                module.forward = lambda x, before=module.forward: 0.5 * before(x)
    assert_same(ours, theirs)


@pytest.mark.parametrize("part", ["lm_head", "post_attention_layernorm", "act_fn"])
def test_a_part_that_others_exchange_later_is_called(part):
    """An adapter may take the place of a norm, and quantization that of a head."""
    ours, theirs, _ = pair()
    for model in (ours, theirs):
        for name, module in list(model.named_modules()):
            if name.endswith(part):
                model.set_submodule(name, nn.Sequential(module, nn.Tanh()))
    assert_same(ours, theirs)


def test_global_hooks_are_called_for_every_part():
    names = []
    for model in pair()[:2]:
        called = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, *_, called=called: called.append(module._get_name())
        )
        model(TOKENS, labels=LABELS)
        hook.remove()
        names.append(sorted(called))
    assert names[0] == names[1]


@pytest.mark.parametrize("part", ["lm_head", "post_attention_layernorm"])
def test_full_backward_hooks_see_the_gradients_that_they_saw(part):
    seen = []
    for model in pair()[:2]:
        name = next(name for name, _ in model.named_modules() if name.endswith(part))
        model.get_submodule(name).register_full_backward_hook(
            lambda module, dinputs, doutputs: seen.append(dinputs[0])
        )
        model(TOKENS, labels=LABELS).loss.backward()
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("before", [True, False])
def test_parametrizations_hold_and_are_removed(before):
    """Their removal reads the class beneath the one that they made."""
    ours, theirs, _ = pair()
    models = hugging_face() if before else ours, theirs
    parts = [
        model.get_submodule(name)
        for model in models
        for name in ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj")
    ]
    for part in parts:
        parametrizations.weight_norm(part)
    if before:
        apply(models[0])
    for model in models:
        for weight in model.parameters():
            weight.data.mul_(1.25)
    assert_same(*models)
    assert_same(apply(copy.deepcopy(models[0])), models[1])
    for part in parts:
        parametrize.remove_parametrizations(part, "weight")
    assert_same(*models)
    assert apply(models[0]).train()(TOKENS, labels=LABELS).logits is None


def test_a_functional_call_takes_the_weights_that_it_is_given():
    ours, theirs, _ = pair()
    weights = {name: 0.5 * weight.detach() for name, weight in theirs.named_parameters()}
    losses = [
        torch.func.functional_call(model, weights, (TOKENS,), {"labels": LABELS}).loss
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(*losses)
