"""The whole model on fused kernels, prompt, step and decode, against the reference backend."""

import copy

import pytest
import torch
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.config import BYTE_VOCABULARY, PRESETS, ModelSettings
from emu3.model import Emu3
from emu3_kernels import linear_cross_entropy, use_backend
from emu3_kernels.modules import speed_up_bfloat16
from emu3_kernels.testing.budget import assert_as_accurate

# Emu3's own layers, two of them, over a vocabulary and positions that no kernel's shape depends on.
SHORT = {
    "num_layers": 2,
    "vocabulary": BYTE_VOCABULARY,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
EIGHTH = {"hidden_size": 512, "num_heads": 4, "num_kv_heads": 1, "intermediate_size": 1792}
LAYER = {"num_layers": 1, "intermediate_size": 3584}
MODELS = [
    pytest.param(PRESETS["mini"], id="mini"),
    pytest.param(PRESETS["8b"].model_copy(update=SHORT | EIGHTH), id="8b, 2 layers, an eighth"),
    pytest.param(
        PRESETS["8b"].model_copy(update=SHORT | LAYER), id="8b, a layer", marks=pytest.mark.e2e
    ),  # 88 million parameters, three times, once in float64
]
PROMPT, NEW = 37, 3


def results(model: Emu3) -> dict[str, Tensor]:
    """Hidden states of a prompt and of tokens decoded after it, losses and every gradient.

    The losses of single tokens, since the error of one number, their mean, would be luck.
    """
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (2, PROMPT + NEW), generator=random)
    weights = torch.rand(2, PROMPT + NEW, generator=random)
    weight = model.head.weight
    cache = KeyValueCache(model.settings, 2, PROMPT + NEW, dtype=weight.dtype)
    with torch.no_grad():
        found = {"prompt": model(tokens[:, :PROMPT], cache)}
        steps = [model(tokens[:, i : i + 1], cache) for i in range(PROMPT, PROMPT + NEW)]
        found["decoded"] = torch.cat(steps, dim=1)
        hidden, targets = model(tokens[:, :-1]), tokens[:, 1:]
        found["losses"] = linear_cross_entropy(hidden, weight, targets, reduction="none")
    loss = model.loss(tokens, weights)
    shares = weights[:, 1:] / weights[:, 1:].sum()
    torch.testing.assert_close(loss.detach(), (shares * found["losses"]).sum())
    loss.backward()
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found | gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", MODELS)
def test_prompt_step_and_decode_are_those_of_the_reference(settings: ModelSettings, dtype):
    torch.manual_seed(0)
    model = speed_up_bfloat16(Emu3(settings).to(dtype))
    actual = results(model)
    with use_backend("reference"):
        low = results(model)
        exact = results(copy.deepcopy(model).double())
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])
