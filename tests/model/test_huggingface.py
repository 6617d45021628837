"""Hugging Face's Emu3 with our ops in it, against the same model without them."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForCausalLM,
    Emu3ForConditionalGeneration,
    Emu3VQVAE,
    Emu3VQVAEConfig,
)
from transformers.models.emu3 import modeling_emu3 as hf

from emu3_kernels import record_backends
from emu3_kernels.huggingface import apply
from emu3_kernels.runtime import gemm
from emu3_kernels.testing.budget import assert_as_accurate
from tests import fresh
from tests.model.test_model import hugging_face, some_tokens
from tests.model.tiny import TINY

TOKENS = some_tokens(2, 37)
LABELS = TOKENS.clone()
LABELS[:, 5:20] = -100
PADDED = torch.ones_like(TOKENS)
PADDED[0, :9] = 0
DTYPES = (torch.float32, torch.bfloat16)


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, nn.Module]:
    """One model three times: with our ops, without, and without in float64; in training mode."""
    theirs = hugging_face().to(dtype).train()
    return apply(copy.deepcopy(theirs)), theirs, copy.deepcopy(theirs).double()


def plain_loss(model: nn.Module, labels: torch.Tensor = LABELS, **inputs) -> torch.Tensor:
    """The loss in the dtype of ``model``: its own rounds the logits of a float64 model."""
    logits = model(TOKENS, **inputs).logits[:, :-1].flatten(0, 1)
    compute = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(compute), labels[:, 1:].flatten())


def with_gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, weights)))}  # noqa: B905


def assert_all_as_accurate(actual: dict, low: dict, exact: dict) -> None:
    assert actual.keys() == low.keys()
    for name in actual:
        assert_as_accurate(name, actual[name], low[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [{}, {"attention_mask": PADDED}], ids=["whole", "padded"])
@torch.no_grad()
def test_logits_are_as_accurate_as_before(dtype, inputs):
    ours, theirs, exact = pair(dtype)
    seen = PADDED.bool() if inputs else torch.ones_like(PADDED).bool()
    assert_as_accurate(
        "logits", *(model(TOKENS, **inputs).logits[seen] for model in (ours, theirs, exact))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_are_as_accurate_as_before(dtype):
    ours, theirs, exact = pair(dtype)
    assert_all_as_accurate(
        with_gradients(ours, ours(TOKENS, labels=LABELS).loss),
        with_gradients(theirs, theirs(TOKENS, labels=LABELS).loss),
        with_gradients(exact, plain_loss(exact)),
    )


def test_sequences_with_positions_of_their_own_turn_by_them():
    """Positions that only shift leave attention alone, so these differ in their steps too."""
    ours, theirs, exact = pair()
    positions = torch.stack([torch.arange(37), 3 * torch.arange(37) + 11])
    inputs = {"position_ids": positions}
    assert_as_accurate(
        "logits", *(model(TOKENS, **inputs).logits.detach() for model in (ours, theirs, exact))
    )


def test_tables_are_not_rounded_to_narrow_weights():
    ours, theirs, _ = pair(torch.bfloat16)
    positions, narrow = torch.arange(37)[None], ours.get_input_embeddings()(TOKENS)
    exact = theirs.model.rotary_emb(narrow.float(), positions)
    for name, table in zip(("cos", "sin"), ours.model.rotary_emb(narrow, positions), strict=True):
        assert table.equal(exact[name == "sin"]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": int(LABELS[0, 3])},
        {"shift_labels": LABELS.flip(1).clamp(min=0)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_loss_mean_what_they_mean_in_transformers(settings):
    ours, theirs, _ = pair()
    labels = LABELS.clamp(min=0) if "ignore_index" in settings else LABELS
    actual, expected = (model(TOKENS, labels=labels, **settings).loss for model in (ours, theirs))
    torch.testing.assert_close(actual, expected)


def test_the_loss_over_no_token_is_zero_with_zero_gradients():
    ours, _, _ = pair()
    loss = ours(TOKENS, labels=torch.full_like(TOKENS, -100)).loss
    assert all(not value.any() for value in with_gradients(ours, loss).values())


class Untouched(nn.Linear):
    def __call__(self, *_):
        pytest.fail("logits were made")


def test_with_labels_there_are_no_logits_and_the_head_is_never_called():
    ours, _, _ = pair()
    assert ours(TOKENS).logits.shape == (*TOKENS.shape, TINY.vocabulary.size)
    ours.lm_head.__class__ = Untouched
    by_name, by_place = ours(TOKENS, labels=LABELS), ours(TOKENS, None, None, None, None, LABELS)
    assert by_name.logits is None
    assert by_place.loss.equal(by_name.loss)
    (loss,) = ours(TOKENS, labels=LABELS, return_dict=False, use_cache=False)
    assert loss.equal(by_name.loss)


def double_loss(logits, labels, **_):
    return logits.double().mean()


def biased(model: nn.Module) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(TINY.vocabulary.size))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda model: setattr(model, "loss_function", double_loss), {}),
        (biased, {}),
        (lambda model: setattr(model.lm_head, "forward", model.lm_head.forward.__call__), {}),
        (lambda model: None, {"logits_to_keep": 37}),
        (lambda model: None, {"logits_to_keep": torch.arange(37)}),
    ],
    ids=["loss_function", "bias", "hooked head", "logits_to_keep", "some logits_to_keep"],
)
def test_a_loss_that_the_op_does_not_know_is_computed_as_before(change, settings):
    ours, theirs, _ = pair()
    for model in (ours, theirs):
        change(model)
    actual, expected = (model(TOKENS, labels=LABELS, **settings) for model in (ours, theirs))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_gives_the_same_tokens(cache):
    ours, theirs, _ = pair()
    settings = {"do_sample": False, "max_new_tokens": 24, "cache_implementation": cache}
    drawn = [
        model.generate(TOKENS, attention_mask=PADDED, eos_token_id=None, **settings)
        for model in (ours, theirs)
    ]
    assert drawn[0].shape == (2, 37 + 24)
    assert drawn[0].equal(drawn[1])


def test_every_op_runs():
    ours, _, _ = pair()
    with record_backends() as ran:
        ours(TOKENS, labels=LABELS)
    assert set(ran) == {"rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"}


@pytest.mark.parametrize("slow", [True, False])
def test_linear_layers_are_ours_where_pytorch_is_slow(slow, monkeypatch):
    """With labels too, where the head is replaced as any linear layer is."""
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", slow)
    ours, theirs, exact = pair(torch.bfloat16)
    ran = []
    matmul = gemm.matmul
    monkeypatch.setattr(gemm, "matmul", lambda *args: ran.append(1) or matmul(*args))
    logits = ours(TOKENS).logits.detach()
    assert bool(ran) == slow
    expected = (model(TOKENS).logits.detach() for model in (theirs, exact))
    assert_as_accurate("logits", logits, *expected)
    assert ours(TOKENS, labels=LABELS).logits is None


def test_the_instance_alone_is_changed():
    before = {
        kind: kind.forward
        for kind in vars(hf).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    ours, theirs, _ = pair()
    assert all(kind.forward is forward for kind, forward in before.items())
    assert theirs(TOKENS, labels=LABELS).logits is not None
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    assert all(
        isinstance(m, type(n)) for m, n in zip(ours.modules(), theirs.modules(), strict=True)
    )
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


def test_applying_twice_is_applying_once():
    ours, _, _ = pair()
    loss = ours(TOKENS, labels=LABELS).loss
    assert apply(ours) is ours
    assert ours(TOKENS, labels=LABELS).loss.equal(loss)


def test_a_copy_computes_with_its_own_weights():
    ours, _, _ = pair()
    loss = ours(TOKENS, labels=LABELS).loss
    other = copy.deepcopy(ours)
    for weight in other.parameters():
        weight.data.zero_()
    assert ours(TOKENS, labels=LABELS).loss.equal(loss)
    assert other(TOKENS, labels=LABELS).logits is None


def test_a_pickled_model_comes_back_as_transformers_made_it():
    ours, theirs, _ = pair()
    again = pickle.loads(pickle.dumps(ours))
    assert [type(m) for m in again.modules()] == [type(m) for m in theirs.modules()]
    assert again(TOKENS, labels=LABELS).logits.equal(theirs(TOKENS, labels=LABELS).logits)


def test_recorded_hidden_states_and_attentions_are_those_of_every_layer():
    ours, theirs, exact = pair()
    for model in (ours, theirs, exact):
        model.set_attn_implementation("eager")
    seen = [
        model(TOKENS, labels=LABELS, output_hidden_states=True, output_attentions=True)
        for model in (ours, theirs, exact)
    ]
    for what, count in (("hidden_states", 1 + TINY.num_layers), ("attentions", TINY.num_layers)):
        layers = [getattr(output, what) for output in seen]
        assert len(layers[0]) == count
        for actual, low, true in zip(*layers, strict=True):
            assert_as_accurate(what, actual.detach(), low.detach(), true.detach())


def test_gradient_checkpointing_changes_no_gradient():
    ours, _, _ = pair()
    expected = with_gradients(ours, ours(TOKENS, labels=LABELS).loss)
    ours.train().activation_checkpointing_enable()
    actual = with_gradients(ours, ours(TOKENS, labels=LABELS, use_cache=False).loss)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_dropout_falls_where_it_fell_before():
    ours, theirs, exact = pair()
    losses = []
    for model in (ours, theirs, exact):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
            if isinstance(module, hf.Emu3Attention):
                module.attention_dropout = 0.5
        torch.manual_seed(0)
        losses.append(plain_loss(model).detach())
    assert_as_accurate("loss", *losses)


def test_autocast_narrows_what_it_narrowed_before():
    """A branch comes out in bfloat16 and joins a float32 stream, which an op refuses."""
    ours, theirs, exact = pair()
    with torch.autocast("cpu", torch.bfloat16):
        actual, low = (model(TOKENS, labels=LABELS) for model in (ours, theirs))
        logits = ours(TOKENS).logits
    assert_all_as_accurate(
        {"logits": logits.detach()} | with_gradients(ours, actual.loss),
        {"logits": low.logits.detach()} | with_gradients(theirs, low.loss),
        {"logits": exact(TOKENS).logits.detach()} | with_gradients(exact, plain_loss(exact)),
    )


@pytest.mark.e2e
def test_a_training_step_compiles_in_one_piece():
    ours, _, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    inputs = {"labels": LABELS, "use_cache": False}
    torch.testing.assert_close(compiled(TOKENS, **inputs).loss, ours(TOKENS, **inputs).loss)


def tiny_quantizing_config(**changes) -> Emu3VQVAEConfig:
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    small = {"codebook_size": 64, "attn_resolutions": [], "hidden_size": 32}
    return Emu3VQVAEConfig(**sizes, **small, temporal_downsample_factor=4, **changes)


def test_codes_are_the_nearest():
    torch.manual_seed(0)
    tokenizer = Emu3VQVAE(tiny_quantizing_config())
    latents = 0.01 * torch.randn(2, 3, 4, 5, 6)
    with record_backends() as ran:
        codes = apply(tokenizer).quantize(latents)
    rows = latents.movedim(2, -1).double()
    book = tokenizer.quantize.embedding.weight.double()
    assert codes.equal((rows[..., None, :] - book).square().sum(-1).argmin(-1))
    assert set(ran) == {"nearest_code"}


def test_a_codebook_too_wide_for_the_op_is_searched_as_before():
    tokenizer = Emu3VQVAE(tiny_quantizing_config(embed_dim=33))
    latents = torch.randn(1, 1, 33, 2, 2)
    expected = tokenizer.quantize(latents)
    assert apply(tokenizer).quantize(latents).equal(expected)


def test_another_activation_is_left_alone():
    theirs = hugging_face()
    theirs.config.hidden_act = "gelu"
    model = Emu3ForCausalLM(theirs.config).eval()
    before = model(TOKENS).logits
    torch.testing.assert_close(apply(model)(TOKENS).logits, before, rtol=1e-4, atol=1e-4)


def multimodal() -> Emu3ForConditionalGeneration:
    """The whole of Emu3 with 64 codes, whose tokens are 300 to 363."""
    torch.manual_seed(0)
    names = {f"<|visual token {code:06}|>": 300 + code for code in range(64)}
    config = Emu3Config(
        text_config=hugging_face().config.to_dict(),
        vq_config=tiny_quantizing_config().to_dict(),
        vocabulary_map={"<image>": 299, "<|extra_200|>": 298, **names},
    )
    return Emu3ForConditionalGeneration(config).eval()


def test_pictures_and_text_together():
    theirs = multimodal()
    ours, exact = apply(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    factor = theirs.model.vqmodel.vision_spatial_factor
    size = 4 * factor
    picture = torch.rand(1, 3, size, size) * 2 - 1
    tokens = torch.tensor([[1, 2, *[299] * 20, 3, 4, 5]])
    inputs = {"image_sizes": torch.tensor([[size, size]])}
    outputs = [
        model(tokens, pixel_values=picture.to(model.dtype), **inputs).logits.detach()
        for model in (ours, theirs, exact)
    ]
    assert_as_accurate("logits", *outputs)
    loss = ours(tokens, pixel_values=picture, **inputs, labels=tokens, skip_logits=True)
    assert loss.logits is None
    expected = F.cross_entropy(outputs[1][0, :-1], tokens[0, 1:])
    torch.testing.assert_close(loss.loss, expected)


def test_parts_of_the_model_are_taken_too():
    model = hugging_face().model
    exact, before = copy.deepcopy(model).double(), model(TOKENS).last_hidden_state
    after = apply(model)(TOKENS).last_hidden_state
    assert_as_accurate("hidden", after, before, exact(TOKENS).last_hidden_state)
    assert after.grad_fn is not None


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a name", hf.Emu3RMSNorm(8)])
def test_another_model_is_refused_in_one_line(model):
    with pytest.raises(TypeError, match=r"^huggingface\.apply: model must be an Emu3 .* got ") as e:
        apply(model)
    assert "\n" not in str(e.value)


def test_a_forward_pass_that_another_patch_replaced_is_not_replaced_again():
    model = hugging_face()
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.forward must be its class's own"):
        apply(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in hugging_face().modules()]


def test_transformers_is_imported_by_the_call_alone():
    code = "import sys, emu3_kernels.huggingface; sys.exit('transformers' in sys.modules)"
    assert fresh.run(code).returncode == 0
