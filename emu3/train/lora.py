"""LoRA adapters on the packed projections of a decoder, in PEFT's layers, and frozen weights.

Adapters are float32, and trained with all other weights frozen. Every rank holds them whole, but
for the dimension that tensor parallelism cuts: they are small, and FSDP passes over them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from emu3.files import replacing
from emu3.model import Emu3
from emu3.settings import Settings
from emu3.weights import save_tensors
from emu3_kernels import add_rms_norm

TARGETS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Projections that may have an adapter, and the official modules that they are made of."""
_ADAPTED = re.compile(r"\.(?:base_layer|(lora_[AB])\.default)\.weight$")
_LAYERS = {"huggingface": "model.text_model.layers", "official": "model.layers"}


class LoraSettings(Settings):
    """Adapters ``W + alpha / rank * B @ A``; all other weights are frozen."""

    rank: PositiveInt = 8
    """Of the adapter of each projection; those packed together, as q, k and v, share ``A``."""
    alpha: PositiveFloat = 16.0
    dropout: float = Field(0.0, ge=0, lt=1)
    """On what an adapter reads."""
    targets: tuple[str, ...] = Field(tuple(TARGETS), min_length=1)
    """Of ``qkv``, ``out``, ``gate_up`` and ``down``, in every layer."""
    names: Literal["huggingface", "official"] = "huggingface"
    """Of the adapters in their file: those of Hugging Face's ``Emu3ForConditionalGeneration``, or
    of the official ``Emu3ForCausalLM``."""

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for name in targets:
            if name == "head":
                raise ValueError("head cannot have an adapter: the loss reads its weight alone")
            if name not in TARGETS:
                raise ValueError(f"must be of {', '.join(TARGETS)}, unlike {name!r}")
        return targets


class Adapted(NamedTuple):
    """A parameter of a model with adapters."""

    weight: str
    """The name of the weight that it is, or belongs to, in a model without adapters."""
    matrix: str | None
    """``lora_A`` or ``lora_B``; None for the weight itself."""


def adapted(name: str) -> Adapted:
    """Say what the parameter ``name`` is."""
    match = _ADAPTED.search(name)
    if match is None:
        return Adapted(name, None)
    return Adapted(f"{name[: match.start()]}.weight", match[1])


def add_adapters(model: Emu3, settings: LoraSettings) -> None:
    """Freeze the weights of ``model``, on the meta device, and add adapters, in place.

    Raises:
        ValueError: one line, if PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError("lora: PEFT is not installed: pip install 'emu3-kernels[lora]'")
    # Imported here: it takes seconds.
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(settings.targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    if settings.dropout > 0:
        for site, layer in enumerate(_layers(model)):
            layer.lora_dropout["default"] = SeededDropout(settings.dropout, site)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the weights whose names fit one of ``patterns``, in which ``*`` is any part of one.

    Raises:
        ValueError: one line, if a pattern fits no name, or nothing would be left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"train: freeze must name weights, such as {', '.join(list(names)[:3])}, "
                f"got {pattern!r}"
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError("train: freeze must leave some weights to train, got all of them")


def is_trained(name: str, patterns: Sequence[str]) -> bool:
    """Whether :func:`freeze` leaves the weight ``name`` trained."""
    return not any(fnmatchcase(name, pattern) for pattern in patterns)


class SeededDropout(nn.Module):
    """Dropout with a seed that :func:`set_dropout` gives: a block that is computed again, or on
    another mesh, drops the same."""

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site = p, site
        self.seed: Tensor | None = None
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # The residual sum of a branch and nothing; its norm is not read.
        nothing = x.new_zeros(x.shape[-1])
        given = {"dropout_p": self.p, "seed": self.seed, "dropout_rows": self.rows}
        return add_rms_norm(x, nothing.expand_as(x), nothing, 1.0, **given)[1]


def num_dropout_sites(model: Emu3) -> int:
    """Return how many seeds :func:`set_dropout` takes."""
    return sum(isinstance(module, SeededDropout) for module in model.modules())


def set_dropout(model: Emu3, seeds: Tensor, rows: Tensor) -> None:
    """Give the adapters of ``model`` a seed each, and the rows ``[B, T]`` of the tokens."""
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.seed, module.rows = seeds[module.site], rows


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add the adapters among official ``tensors`` to their weights, in float32.

    Args:
        scale: alpha over rank.
    """
    weights = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for module, (down, up) in _pairs(tensors).items():
        base = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = base.float().addmm(up, down, alpha=scale).to(base.dtype)
    return weights


def save_adapters(
    folder: Path, tensors: Mapping[str, Tensor], settings: LoraSettings, base: str
) -> None:
    """Write the adapters among official ``tensors`` as PEFT does; the config appears last.

    ``A`` of packed projections is written for each of them.

    Args:
        folder: of ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: what the config names as the base model.
    """
    layers, found = _LAYERS[settings.names], {}
    for module, matrices in _pairs(tensors).items():
        name = f"base_model.model.{module.replace('model.layers', layers, 1)}"
        found |= {f"{name}.lora_{x}.weight": m.clone() for x, m in zip("AB", matrices, strict=True)}
    leaves = "|".join(official for name in settings.targets for official in TARGETS[name])
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "bias": "none",
        # With its layer: vision tokenizers have projections of these names too.
        "target_modules": rf".*\.layers\.\d+\.({leaves.replace('.', chr(92) + '.')})",
    }
    save_tensors(folder / "adapter_model.safetensors", found, {"format": "pt"})
    with replacing(folder / "adapter_config.json") as draft:
        draft.write_text(json.dumps(config, indent=2) + "\n")


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and ``B`` by official module; packed ones share the ``A`` of the first of them."""
    owners = {name: parts[0] for parts in TARGETS.values() for name in parts}
    found = {}
    for name, up in tensors.items():
        if name.endswith(".lora_B.weight"):
            module = name.removesuffix(".lora_B.weight")
            layer, leaf = module.rsplit(".", 2)[0], ".".join(module.rsplit(".", 2)[1:])
            found[module] = tensors[f"{layer}.{owners[leaf]}.lora_A.weight"], up
    return found


def _layers(model: Emu3) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_dropout")]
