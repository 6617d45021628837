"""A whole training step beside Hugging Face's Emu3: same weights, same tokens, one process.

A step is forward and backward, without an optimizer. V vocabulary, T predicted tokens.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import clock
from benchmarks.bounds import PRODUCTS
from benchmarks.clock import Call
from benchmarks.contestants import Lineup
from benchmarks.duel import paired_ratio
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

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A model's mean loss of ``tokens [1, T + 1]``, the targets weighed by ``weights [1, T]``, 0 or
1."""


class Entrant(NamedTuple):
    """Who trains."""

    name: str
    model: nn.Module
    loss: Loss


def entrants(settings: ModelSettings, dtype: torch.dtype) -> list[Entrant]:
    """Build everyone with the same weights, ours first."""
    theirs = hugging_face(settings, dtype)
    return [
        Entrant(OURS, emu3(settings, theirs), weighted),
        Entrant(THEIRS, theirs, labelled),
        Entrant(APPLIED, huggingface.apply(copy.deepcopy(theirs)), labelled),
    ]


def emu3(settings: ModelSettings, theirs: nn.Module) -> Emu3:
    """Build our decoder with the weights of ``theirs``."""
    ours = Emu3(settings).to(theirs.dtype)
    weights = theirs.state_dict()
    for name, view in official_views(ours).items():
        view.copy_(weights[name])
    return ours


def hugging_face(settings: ModelSettings, dtype: torch.dtype) -> nn.Module:
    """Build theirs as ``from_pretrained`` would: the rotary frequencies stay float32."""
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
    model.to(dtype)
    model.model.rotary_emb = frequencies
    return model.train()


def weighted(model: Emu3, tokens: Tensor, weights: Tensor) -> Tensor:
    """Our loss; it weighs every token, the first too, which nothing predicts."""
    return model.loss(tokens, torch.cat([weights[:, :1], weights], dim=1))


def labelled(model: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """Hugging Face's loss; it has labels that do not count and no weights."""
    labels = tokens[:, 1:].masked_fill(weights == 0, -100)
    return model(tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss


def drawn(settings: ModelSettings, num_tokens: int, seed: int) -> Tensor:
    """Draw tokens ``[1, T + 1]``, low ones often, so that there is something to learn."""
    random = torch.rand(1, num_tokens + 1, generator=torch.Generator().manual_seed(seed))
    return (settings.vocabulary.size * random.double() ** 8).long()


def matrices(settings: ModelSettings, num_tokens: int, counted: int) -> list[tuple[int, int, int]]:
    """List the products with weights of a forward pass as tokens, inputs and outputs.

    Attention is left out, and the head multiplies the tokens that count.
    """
    s = settings
    queries, heads = s.heads * s.head_width, (s.heads + 2 * s.kv_heads) * s.head_width
    of_a_block = [(s.width, heads), (queries, s.width), (s.width, 2 * s.ff_width)]
    of_a_block.append((s.ff_width, s.width))
    blocks = [(num_tokens, *matrix) for _ in range(s.layers) for matrix in of_a_block]
    return [*blocks, (counted, s.width, s.vocabulary.size)]


def products(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu") -> Call:
    """Multiply what a step multiplies: each product, and the two that its gradients take."""
    on = {"device": device, "dtype": dtype}
    drawn = {s: [torch.randn(s[0], n, **on) for n in s[1:]] for s in set(shapes)}
    weights = {s: torch.randn(s[2], s[1], **on) for s in set(shapes)}

    def call() -> None:
        for shape in shapes:
            (x, dout), weight = drawn[shape], weights[shape]
            torch.mm(x, weight.T)
            torch.mm(dout, weight)
            torch.mm(dout.T, x)

    return call


def flops(shapes: list[tuple[int, int, int]]) -> int:
    """Count the FLOPs of ``products``."""
    return sum(6 * tokens * inputs * outputs for tokens, inputs, outputs in shapes)


def bound(shapes: list[tuple[int, int, int]], taken: dict[str, list[float]]) -> dict[str, Any]:
    """Set the step against its products alone, timed in the same rounds."""
    alone = taken[PRODUCTS]
    return {
        "label": "BOUND",
        "flops": flops(shapes),
        "ms": 1e3 * median(alone),
        "fraction": paired_ratio(alone, taken[OURS])["median"],
        # No step gains more on theirs: so many times as long as the products does it take.
        "ceilings": {
            name: paired_ratio(taken[name], alone)["median"]
            for name in (THEIRS, APPLIED)
            if name in taken
        },
    }


def outside(taken: dict[str, list[float]]) -> dict[str, float]:
    """Return the seconds that everyone spends on anything but the products, round by round."""
    alone = taken[PRODUCTS]
    return {
        name: median(step - product for step, product in zip(steps, alone, strict=True))
        for name, steps in taken.items()
        if name != PRODUCTS
    }


def lineup(
    everyone: list[Entrant],
    settings: ModelSettings,
    num_tokens: int,
    counted: int,
    device: str = "cpu",
) -> Lineup:
    """Bring everyone to the second step, each checked against ours; the last ``counted`` count.

    Memory is what stands above weights and gradients at the peak of a step.
    """
    tokens = drawn(settings, num_tokens, seed=0).to(device)
    weights = torch.ones(1, num_tokens, device=device)
    weights[:, : num_tokens - counted] = 0
    entered, losses = Lineup(clock=clock.of(device)), {}
    for name, model, loss in everyone:
        losses[name] = entered.enter(name, step(model.to(device), loss, tokens, weights))
        gradients = sum(weight.nbytes for weight in model.parameters())
        entered.peak_mib[name] -= gradients / 2**20
        if abs(losses[name] / losses[OURS] - 1) > SAME_LOSS:
            entered.drop(name, f"its loss is {losses[name]:.4f}, ours {losses[OURS]:.4f}")
    dtype = next(everyone[0].model.parameters()).dtype
    entered.enter(PRODUCTS, products(matrices(settings, num_tokens, counted), dtype, device))
    return entered


def step(model: nn.Module, loss: Loss, tokens: Tensor, weights: Tensor) -> Call:
    def call() -> float:
        value = loss(model, tokens, weights)
        value.backward()
        model.zero_grad(set_to_none=True)
        return value.item()

    return call


def after_steps(
    everyone: list[Entrant],
    settings: ModelSettings,
    num_tokens: int,
    num_steps: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train copies of ours and theirs on the same tokens with AdamW, step by step."""
    trained = [e._replace(model=copy.deepcopy(e.model).to(device)) for e in everyone[:2]]
    optimizers = [torch.optim.AdamW(e.model.parameters(), lr=1e-3, fused=True) for e in trained]
    weights, losses = torch.ones(1, num_tokens, device=device), {}
    for seed in range(num_steps):
        tokens = drawn(settings, num_tokens, seed).to(device)
        for (name, model, loss), optimizer in zip(trained, optimizers, strict=True):
            value = loss(model, tokens, weights)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = value.item()
    return {"steps": num_steps, "tokens": num_tokens, "losses": losses}
