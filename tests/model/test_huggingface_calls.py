"""A Hugging Face Emu3 with our ops in it is called in every way that it was called before."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.model.test_huggingface import LABELS, TOKENS, pair, plain_loss
from tests.model.test_model import hugging_face
from tests.model.tiny import TINY


@pytest.mark.parametrize("part", ["lm_head", "post_attention_layernorm", "act_fn"])
def test_hooks_of_parts_that_an_op_spans_are_called_as_before(part):
    ours, theirs, _ = pair()
    for model in (ours, theirs):
        for name, module in model.named_modules():
            if name.endswith(part):
                module.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    actual, expected = (model(TOKENS, labels=LABELS).loss for model in (ours, theirs))
    torch.testing.assert_close(actual, expected)
    assert not torch.isclose(actual, plain_loss(hugging_face()))


def test_a_decoder_layer_takes_its_arguments_by_place_too():
    ours, theirs, _ = pair()
    hidden, places = torch.randn(1, 5, TINY.hidden_size), torch.arange(5)[None]
    drawn = []
    for model in (ours, theirs):
        tables = model.model.rotary_emb(hidden, places)
        drawn.append(model.model.layers[0](hidden, None, places, None, False, tables))
    torch.testing.assert_close(*drawn)


@pytest.mark.e2e
def test_continuous_batching_gives_the_same_tokens():
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    drawn = []
    for model in pair()[:2]:
        model.set_attn_implementation("sdpa")
        answers = model.eval().generate_batch([[5, 6, 7, 8], [9, 10, 11]], settings, sizes)
        drawn.append(sorted(answer.generated_tokens for answer in answers.values()))
    assert drawn[0] == drawn[1]
    assert [len(tokens) for tokens in drawn[0]] == [4, 4]
