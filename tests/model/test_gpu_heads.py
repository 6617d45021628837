"""The heads of both models on a GPU: GEMMs that are aligned, though their vocabulary is odd."""

import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3.config import PRESETS
from emu3.model import Emu3
from emu3_kernels import huggingface, linear_cross_entropy, use_backend
from tests.loss.fake_gpu import empty, on_fake_gpu, unaligned

V = 184_622


def test_the_head_of_a_hugging_face_model_is_aligned():
    config = Emu3TextConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    with on_fake_gpu() as recorded, torch.device("meta"):
        model = huggingface.apply(Emu3ForCausalLM(config)).bfloat16()
        tokens = empty(2, 16, dtype=torch.int64)
        with use_backend("reference", "attention"):
            model(tokens, labels=tokens).loss.backward()
            model.eval()
            logits = model(tokens).logits
            logits.float().logsumexp(-1).sum().backward()
            with torch.no_grad():
                model(tokens[:, :1])
    assert logits.shape == (2, 16, V)
    wide = [one for one in recorded.gemms if max(map(max_extent, one)) > V // 2]
    assert len(wide) == 4  # logits twice, once with both gradients; the loss takes chunks
    assert not unaligned(wide)


def test_the_head_of_the_model_is_aligned():
    settings = PRESETS["8b"].model_copy(update={"num_layers": 1})
    with on_fake_gpu() as recorded, torch.device("meta"):
        model = Emu3(settings).bfloat16()
        hidden = empty(2, 16, settings.hidden_size, requires_grad=True)
        ids = settings.vocabulary
        for rows in (slice(None), slice(ids.num_text), slice(ids.visual_start, ids.size)):
            model.logits(hidden, rows).sum().backward()
            with torch.no_grad():
                model.logits(hidden[:, -1], rows)
        linear_cross_entropy(
            hidden.flatten(0, 1), model.head.weight, empty(32, dtype=torch.int64)
        ).backward()
    assert recorded.gemms
    assert not unaligned(recorded.gemms)


def max_extent(matrix):
    return max(matrix.rows, matrix.columns)
