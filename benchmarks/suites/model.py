"""A whole training step beside Hugging Face's Emu3: same weights, same tokens, one process.

A step is forward and backward, without an optimizer. V vocabulary, T predicted tokens.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import clock
from benchmarks.harness.bounds import GEMMS
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Entries
from benchmarks.harness.interleave import paired_ratio
from benchmarks.harness.worker import first_line, gpu_is_lost
from emu3.config import PRESETS, ModelSettings
from emu3.model import Emu3
from emu3.weights import official_views
from emu3_kernels import huggingface
from emu3_kernels.modules import speed_up_bfloat16

OURS, THEIRS, APPLIED = "emu3.Emu3", "Hugging Face", "Hugging Face with our ops"

SETTINGS = PRESETS["8b"].model_copy(
    update={
        "hidden_size": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1408,
        "max_position_embeddings": 4096,
        "dropout": 0.0,
    }
)
"""Emu3 with its whole vocabulary, 214 million parameters."""

TOKENS = 2048
SAME_LOSS = 0.005
"""Share by which the losses of two entries may differ."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Mean loss of a model on ``tokens [1, T + 1]`` with target weights ``[1, T]``, each 0 or 1."""


class Trained(NamedTuple):
    """A model and its loss."""

    name: str
    model: nn.Module
    loss: Loss


def trained_models(settings: ModelSettings, dtype: torch.dtype) -> list[Trained]:
    """Build every model with the same weights, ours first."""
    theirs = hugging_face(settings, dtype)
    return [
        Trained(OURS, emu3(settings, theirs), weighted),
        Trained(THEIRS, theirs, labelled),
        Trained(APPLIED, huggingface.apply(copy.deepcopy(theirs)), labelled),
    ]


def emu3(settings: ModelSettings, theirs: nn.Module) -> Emu3:
    """Build our decoder with the weights of ``theirs``."""
    ours = speed_up_bfloat16(Emu3(settings).to(theirs.dtype))
    weights = theirs.state_dict()
    for name, view in official_views(ours).items():
        view.copy_(weights[name])
    return ours


def hugging_face(settings: ModelSettings, dtype: torch.dtype) -> nn.Module:
    """Build theirs as ``from_pretrained`` would: the rotary frequencies stay float32."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    config = Emu3TextConfig(
        vocab_size=settings.vocabulary.size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
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
    """Our loss; it takes a weight for every token, also for the first, which is no target."""
    return model.loss(tokens, torch.cat([weights[:, :1], weights], dim=1))


def labelled(model: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """Hugging Face's loss; it takes ignored labels in place of weights."""
    labels = tokens[:, 1:].masked_fill(weights == 0, -100)
    return model(tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss


def random_tokens(settings: ModelSettings, num_tokens: int, seed: int) -> Tensor:
    """Sample tokens ``[1, T + 1]``, low ones more often, so that the loss can fall."""
    random = torch.rand(1, num_tokens + 1, generator=torch.Generator().manual_seed(seed))
    return (settings.vocabulary.size * random.double() ** 8).long()


def gemm_shapes(
    settings: ModelSettings, num_tokens: int, num_valid: int
) -> list[tuple[int, int, int]]:
    """List the GEMMs with weights of a forward pass as M, K, N.

    Without those of attention. The head takes the valid tokens alone.
    """
    s = settings
    width, queries = s.hidden_size, s.num_heads * s.head_dim
    qkv = queries + 2 * s.num_kv_heads * s.head_dim
    block = [(width, qkv), (queries, width), (width, 2 * s.intermediate_size)]
    block.append((s.intermediate_size, width))
    blocks = [(num_tokens, *matrix) for _ in range(s.num_layers) for matrix in block]
    return [*blocks, (num_valid, width, s.vocabulary.size)]


def gemms(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu") -> Call:
    """Run the GEMMs of a step: each one of forward, and the two of its gradients."""
    on = {"device": device, "dtype": dtype}
    rows = {s: [torch.randn(s[0], n, **on) for n in s[1:]] for s in set(shapes)}
    weights = {s: torch.randn(s[2], s[1], **on) for s in set(shapes)}

    def call() -> None:
        for shape in shapes:
            (x, dout), weight = rows[shape], weights[shape]
            torch.mm(x, weight.T)
            torch.mm(dout, weight)
            torch.mm(dout.T, x)

    return call


def flops(shapes: list[tuple[int, int, int]]) -> int:
    """Count the FLOPs of ``gemms``."""
    return sum(6 * m * k * n for m, k, n in shapes)


def bound(shapes: list[tuple[int, int, int]], taken: dict[str, list[float]]) -> dict[str, Any]:
    """Compare the step with its GEMMs alone, timed in the same rounds."""
    alone = taken[GEMMS]
    return {
        "label": "BOUND",
        "flops": flops(shapes),
        "ms": 1e3 * median(alone),
        "fraction": paired_ratio(alone, taken[OURS])["median"],
        # A step that is nothing but these GEMMs would be so many times faster than theirs.
        "ceilings": {
            name: paired_ratio(taken[name], alone)["median"]
            for name in (THEIRS, APPLIED)
            if name in taken
        },
    }


def outside(taken: dict[str, list[float]]) -> dict[str, float]:
    """Return the seconds that every entry spends outside the GEMMs, round by round."""
    alone = taken[GEMMS]
    return {
        name: median(step - gemm for step, gemm in zip(steps, alone, strict=True))
        for name, steps in taken.items()
        if name != GEMMS
    }


def entries_of(
    everyone: list[Trained],
    settings: ModelSettings,
    num_tokens: int,
    num_valid: int,
    device: str = "cpu",
) -> Entries:
    """Make the first step of every model and compare the losses; the last ``num_valid`` are valid.

    Peak memory is that above weights and gradients.
    """
    tokens = random_tokens(settings, num_tokens, seed=0).to(device)
    weights = torch.ones(1, num_tokens, device=device)
    weights[:, : num_tokens - num_valid] = 0
    entries, losses = Entries(clock=clock.of(device)), {}
    for name, model, loss in everyone:
        try:
            losses[name] = entries.add(name, step(model.to(device), loss, tokens, weights))
        except Exception as error:  # a peer that fails is a result too
            if name == OURS or gpu_is_lost():
                raise
            entries.drop(name, first_line(error))
            continue
        gradients = sum(weight.nbytes for weight in model.parameters())
        entries.peak_mib[name] -= gradients / 2**20
        if abs(losses[name] / losses[OURS] - 1) > SAME_LOSS:
            entries.drop(name, f"its loss is {losses[name]:.4f}, ours {losses[OURS]:.4f}")
    dtype = next(everyone[0].model.parameters()).dtype
    shapes = gemm_shapes(settings, num_tokens, num_valid)
    entries.add(GEMMS, gemms(shapes, dtype, device))
    return entries


def step(model: nn.Module, loss: Loss, tokens: Tensor, weights: Tensor) -> Call:
    def call() -> float:
        value = loss(model, tokens, weights)
        value.backward()
        model.zero_grad(set_to_none=True)
        return value.item()

    return call


def after_steps(
    everyone: list[Trained],
    settings: ModelSettings,
    num_tokens: int,
    num_steps: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train copies of ours and theirs on the same tokens with AdamW."""
    trained = [e._replace(model=copy.deepcopy(e.model).to(device)) for e in everyone[:2]]
    optimizers = [torch.optim.AdamW(e.model.parameters(), lr=1e-3, fused=True) for e in trained]
    weights, losses = torch.ones(1, num_tokens, device=device), {}
    for seed in range(num_steps):
        tokens = random_tokens(settings, num_tokens, seed).to(device)
        for (name, model, loss), optimizer in zip(trained, optimizers, strict=True):
            value = loss(model, tokens, weights)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = value.item()
    return {"steps": num_steps, "tokens": num_tokens, "losses": losses}
