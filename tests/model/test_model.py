"""The decoder against its facts and against Hugging Face's Emu3."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3.cache import KeyValueCache
from emu3.config import PRESETS
from emu3.demo.stages import seed_visual_rows
from emu3.model import Emu3, StepDropout
from emu3.weights import load_decoder_into
from emu3_kernels import Documents, site_seeds, use_backend
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model.tiny import TINY, tiny_model


def test_the_8b_preset_has_the_official_parameter_count():
    with torch.device("meta"):
        model = Emu3(PRESETS["8b"])
    assert sum(p.numel() for p in model.parameters()) == 8_492_011_520


def test_logits_equal_hugging_face_through_a_file(tmp_path):
    ours, theirs = tiny_model(), hugging_face()
    weights = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    load_decoder_into(ours, tmp_path / "model.safetensors")
    tokens = some_tokens(2, 37)
    with torch.no_grad():
        actual, low = ours.head(ours(tokens)), theirs(tokens).logits
        assert_as_accurate("logits", actual, low, theirs.double()(tokens).logits)


def test_a_cache_gives_the_same_hidden_states_in_any_pieces():
    model, tokens = tiny_model().double(), some_tokens(2, 112)
    cache = KeyValueCache(TINY, 2, 112, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in tokens.split((5, 1, 1, 38, 65, 2), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [112, 112]


def test_rows_of_different_lengths_share_a_cache():
    """Padding on the right leaves its keys behind a row's length, where the next tokens go."""
    model, tokens = tiny_model().double(), some_tokens(2, 24)
    cache = KeyValueCache(TINY, 2, 89, dtype=torch.float64)
    with torch.no_grad():
        prompts = model(tokens[:, :20], cache, prompt_lengths=torch.tensor([20, 7]))
        new = model(torch.stack([tokens[0, 20:], tokens[1, 7:11]]), cache)
        whole, short = model(tokens[:1]), model(tokens[1:, :11])
        torch.testing.assert_close(prompts[1, :7], short[0, :7], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(new[0], whole[0, 20:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(new[1], short[0, 7:], rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="at most 64 tokens a call, got 65"):
            model(some_tokens(2, 65), cache)


def test_packed_documents_equal_documents_alone():
    model, tokens = tiny_model().double(), some_tokens(1, 21)
    ids = torch.tensor([[0] * 6 + [1] * 15], dtype=torch.int32)
    packed = model(tokens, document_ids=ids)
    # Rotary positions are relative, so a document may begin anywhere; their tables are float32.
    apart = torch.cat([model(tokens[:, :6]), model(tokens[:, 6:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)


def test_a_full_cache_refuses_another_token():
    model = tiny_model()
    cache = KeyValueCache(TINY, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="5 positions exceed its capacity 4"):
        model(some_tokens(1, 5), cache)


def test_no_token_sees_a_later_one():
    model, tokens = tiny_model(), some_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before[:, :9].equal(after[:, :9])
    assert not before[:, 9:].isclose(after[:, 9:]).all(-1).any()


def test_the_loss_weighs_every_target():
    model, tokens = tiny_model(), some_tokens(2, 13)
    weights = torch.rand(2, 13, generator=torch.Generator().manual_seed(1))
    weights[:, 5] = 0.0

    def plain(model):
        nll = F.cross_entropy(
            model.head(model(tokens[:, :-1])).flatten(0, 1),
            tokens[:, 1:].flatten(),
            reduction="none",
        )
        return (nll * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()

    with torch.no_grad():
        actual, low = model.loss(tokens, weights), plain(model)
        assert_as_accurate("loss", actual, low, plain(model.double()))


def test_the_objective_of_packed_documents_is_that_of_each_alone():
    """With positions that restart, bit for bit the same angles; targets and weights are given."""
    model, tokens, weights = tiny_model().double(), some_tokens(1, 22), torch.rand(1, 22).double()
    bounds, total = ((0, 6), (6, 21)), 0.0
    for first, end in bounds:  # the last target of the first document is the second's first token
        own = slice(first, end + 1) if end == 21 else slice(first, end)
        total += model.loss(tokens[:, own], weights[:, own]) * weights[:, own][:, 1:].sum()
    ids = torch.tensor([[0] * 6 + [1] * 15], dtype=torch.int32)
    positions = torch.cat([torch.arange(6), torch.arange(15)])[None]
    packed = weights[:, 1:].clone()
    packed[0, 5] = 0
    given = tokens[:, :-1], tokens[:, 1:], packed, positions, Documents(ids)
    with torch.no_grad():
        torch.testing.assert_close(model.objective(*given, 3.0), total / 3, rtol=1e-12, atol=0)
        mean = model.objective(*given)
    torch.testing.assert_close(mean, total / packed.sum(), rtol=1e-12, atol=0)


def test_given_seeds_drop_alike_and_draw_nothing():
    model, tokens = tiny_model(dropout=0.5).train(), some_tokens(2, 9)
    given = tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8)
    before = torch.get_rng_state()
    first, again, other = (
        model.objective(*given, dropout=StepDropout(site_seeds(seed, 3, 7))) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("site", range(7))
def test_every_site_of_dropout_has_a_seed_of_its_own(site):
    model, tokens = tiny_model(dropout=0.5).train(), some_tokens(2, 9)
    given = tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8)
    seeds = site_seeds(1, 3, 7)
    others = seeds.clone()
    others[site] += 1
    losses = [model.objective(*given, dropout=StepDropout(s)) for s in (seeds, others)]
    assert losses[0] != losses[1]


def test_under_autocast_it_trains_as_exactly_as_plain_pytorch():
    """The branch of a layer, and the head, were refused: one is narrow, the other is not."""
    tokens = some_tokens(2, 13)
    weights = torch.rand(2, 13, generator=torch.Generator().manual_seed(1))

    def trained(model):
        loss = model.loss(tokens, weights)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}

    exact = trained(tiny_model().double())
    with torch.autocast("cpu", torch.bfloat16):
        actual = trained(tiny_model())
        with use_backend("reference"):
            low = trained(tiny_model())
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


def drop(model, embeddings, attention, branches):
    model.dropout.p = embeddings
    model.settings = TINY.model_copy(update={"dropout": branches})
    for block in model.blocks:
        block.dropout_p = branches
        block.attention.settings = TINY.model_copy(update={"dropout": attention})


def test_dropout_acts_in_training_in_all_four_places():
    """Embeddings, attention probabilities and both branches; none of them in eval mode."""
    tokens = some_tokens(1, 8)
    model = tiny_model(dropout=0.5)
    assert model(tokens).equal(model(tokens))
    model.train()
    drop(model, 0.5, 0.0, 0.0)
    assert not model(tokens).equal(model(tokens)), "embeddings are not dropped"
    drop(model, 0.0, 0.5, 0.0)
    assert not model(tokens).equal(model(tokens)), "attention probabilities are not dropped"
    drop(model, 0.0, 0.0, 0.0)
    assert model(tokens).equal(model(tokens))
    drop(model, 0.0, 0.0, 1 - 2**-40)
    alone = F.rms_norm(model.embedding(tokens), (TINY.hidden_size,), model.norm, TINY.norm_eps)
    torch.testing.assert_close(model(tokens), alone)


def test_a_checkpoint_keeps_what_the_first_forward_pass_kept():
    """Its second forward pass draws the seeds of the first."""
    tokens, weights = some_tokens(2, 8), torch.ones(2, 8)
    model = tiny_model(dropout=0.5).train()

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model.loss(tokens, weights).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert all(a.equal(e) for a, e in zip(gradients(), expected, strict=True))


def test_codes_that_look_alike_start_alike():
    model, ids = tiny_model(), TINY.vocabulary
    before = model.embedding.weight.detach().clone()
    codebook = torch.randn(ids.num_visual, 8, generator=torch.Generator().manual_seed(0))
    codebook[1] = codebook[0]
    codebook[2] = codebook[0] + 0.01
    seed_visual_rows(model, codebook)
    rows = model.embedding.weight[ids.visual_start :]
    assert rows[1].equal(rows[0])
    assert (rows[2] - rows[0]).norm() < 0.1 < (rows[3] - rows[0]).norm()
    assert model.embedding.weight[: ids.visual_start].equal(before[: ids.visual_start])


def some_tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(TINY.vocabulary.size, (rows, length), generator=generator)


def hugging_face() -> Emu3ForCausalLM:
    torch.manual_seed(3)
    config = Emu3TextConfig(
        vocab_size=TINY.vocabulary.size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        max_position_embeddings=TINY.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": TINY.rope_theta},
        rms_norm_eps=TINY.norm_eps,
        initializer_range=TINY.init_std,
        attention_dropout=0.0,
        pad_token_id=TINY.vocabulary.pad,
        tie_word_embeddings=False,
    )
    return Emu3ForCausalLM(config).eval()


def test_a_model_cast_to_bfloat16_keeps_its_rotation_in_float32():
    """It was cast with the weights once, and the rotation then refused the tables."""
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        hidden = model(torch.zeros(1, 5, dtype=torch.int64))
    assert hidden.dtype == torch.bfloat16
    assert model.rotate.cos.dtype == torch.float32
