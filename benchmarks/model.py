"""A whole training step beside Hugging Face's Emu3: same weights, same tokens, one process.

A step is forward and backward, without an optimizer. V vocabulary, T predicted tokens.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import MATRIX, MULTIPLY, Lineup
from benchmarks.duel import Call, paired_ratio
from emu3.config import PRESETS, ModelSettings
from emu3.model import Emu3
from emu3.weights import official_views
from emu3_kernels import huggingface

OURS, THEIRS, APPLIED = "emu3.Emu3", "Hugging Face", "Hugging Face with our ops"

SETTINGS = PRESETS["8b"].model_copy(
    update={
        "width": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "head_width": 64,
        "ff_width": 1408,
        "max_positions": 4096,
        "dropout": 0.0,
    }
)
"""Emu3 with its whole vocabulary, 214 million parameters."""

TOKENS = 2048
SAME_LOSS = 0.005
"""Share by which the losses of two contestants may differ."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of ``tokens [1, T + 1]``, the targets weighed by ``weights [1, T]``, 0 or 1."""


def contestants(settings: ModelSettings) -> Iterator[tuple[str, nn.Module, Loss]]:
    """Build every contestant in bfloat16 with the same weights, ours first."""
    theirs = hugging_face(settings)
    ours = emu3(settings, theirs)
    applied = huggingface.apply(copy.deepcopy(theirs))
    yield OURS, ours, lambda tokens, weights: ours.loss(tokens, padded(weights))
    yield THEIRS, theirs, lambda tokens, weights: labelled(theirs, tokens, weights)
    yield APPLIED, applied, lambda tokens, weights: labelled(applied, tokens, weights)


def emu3(settings: ModelSettings, theirs: nn.Module) -> Emu3:
    """Build our decoder with the weights of ``theirs``."""
    ours = Emu3(settings).to(torch.bfloat16)
    weights = theirs.state_dict()
    for name, view in official_views(ours).items():
        view.copy_(weights[name])
    return ours


def hugging_face(settings: ModelSettings) -> nn.Module:
    """Build theirs as ``from_pretrained`` would: bfloat16, the rotary frequencies in float32."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    config = Emu3TextConfig(
        vocab_size=settings.vocabulary.size,
        hidden_size=settings.width,
        intermediate_size=settings.ff_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_width,
        max_position_embeddings=settings.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        rms_norm_eps=settings.norm_eps,
        initializer_range=settings.init_std,
        attention_dropout=settings.dropout,
        pad_token_id=settings.vocabulary.pad,
    )
    torch.manual_seed(0)
    model = Emu3ForCausalLM(config)
    frequencies = model.model.rotary_emb
    model.model.rotary_emb = copy.deepcopy(frequencies)
    model.to(torch.bfloat16)
    model.model.rotary_emb = frequencies
    return model.train()


def padded(weights: Tensor) -> Tensor:
    """Our loss weighs every token, the first too, which nothing predicts."""
    return torch.cat([weights[:, :1], weights], dim=1)


def labelled(model: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """Hugging Face's loss; it has labels that do not count and no weights."""
    labels = tokens[:, 1:].masked_fill(weights == 0, -100)
    return model(tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss


def drawn(settings: ModelSettings, num_tokens: int, seed: int) -> Tensor:
    """Draw tokens ``[1, T + 1]``, low ones often, so that there is something to learn."""
    random = torch.rand(1, num_tokens + 1, generator=torch.Generator().manual_seed(seed))
    return (settings.vocabulary.size * random.double() ** 8).long()


def flops(settings: ModelSettings, num_tokens: int, counted: int) -> int:
    """Count the FLOPs of the products with weights: one forward and two backward, for each token.

    Attention is left out, and the head multiplies the tokens that count.
    """
    s = settings
    heads = (2 * s.heads + 2 * s.kv_heads) * s.head_width
    blocks = s.layers * s.width * (heads + 3 * s.ff_width)
    return 6 * (num_tokens * blocks + counted * s.width * s.vocabulary.size)


def bound(num_flops: int, ours: list[float], multiply: list[float]) -> dict[str, Any]:
    """Set ours against products of the same FLOPs at the rate of one that was timed beside it."""
    calibration = 2 * MATRIX**3
    return {
        "label": "BOUND",
        "flops": num_flops,
        "tflop_s": num_flops / median(ours) / 1e12,
        "multiply_tflop_s": calibration / median(multiply) / 1e12,
        "fraction": num_flops / calibration * paired_ratio(multiply, ours)["median"],
    }


def lineup(settings: ModelSettings, num_tokens: int, counted: int) -> Lineup:
    """Bring everyone to the third step, each checked against ours; the last ``counted`` count.

    Memory is what stands above weights and gradients at the peak of a step.
    """
    tokens = drawn(settings, num_tokens, seed=0)
    weights = torch.ones(1, num_tokens)
    weights[:, : num_tokens - counted] = 0
    entered, losses = Lineup(), {}
    for name, model, loss in contestants(settings):
        call = step(model, loss, tokens, weights)
        call()
        losses[name] = entered.enter(name, call)
        gradients = sum(weight.nbytes for weight in model.parameters())
        entered.peak_mib[name] -= gradients / 2**20
        if abs(losses[name] / losses[OURS] - 1) > SAME_LOSS:
            entered.drop(name, f"its loss is {losses[name]:.4f}, ours {losses[OURS]:.4f}")
    left, right = (torch.randn(MATRIX, MATRIX).bfloat16() for _ in range(2))
    entered.enter(MULTIPLY, partial(torch.mm, left, right))
    return entered


def step(model: nn.Module, loss: Loss, tokens: Tensor, weights: Tensor) -> Call:
    def call() -> float:
        value = loss(tokens, weights)
        value.backward()
        model.zero_grad(set_to_none=True)
        return value.item()

    return call


def after_steps(settings: ModelSettings, num_tokens: int, num_steps: int) -> dict[str, Any]:
    """Train everyone from the same weights on the same tokens with AdamW; return the losses."""
    losses = {}
    for name, model, loss in contestants(settings):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(num_steps):
            value = loss(drawn(settings, num_tokens, seed), torch.ones(1, num_tokens))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = value.item()
        del optimizer
        gc.collect()
    return {"steps": num_steps, "losses": losses}
