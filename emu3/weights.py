"""Checkpoints in and out, as safetensors; the only file that knows foreign key names.

On disk the decoder has the layout of the official Emu3 files, one tensor per projection; in
memory queries, keys and values share a matrix, and so do gate and up. ``official_views`` lays
the one over the other, so that saving and loading are the same walk.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emu3.config import ModelSettings, Settings, VisionSettings, parse
from emu3.files import replacing
from emu3.model import Emu3
from emu3.vision import VisionTokenizer

# Prefixes of the Hugging Face files (as converted, and as their runtime saves) -> official.
_FOREIGN = (
    (re.compile(r"^(text_model\.model|model\.text_model)\."), "model."),
    (re.compile(r"^text_model\.lm_head\."), "lm_head."),
)
_VISION = re.compile(r"^(model\.)?vqmodel\.")


def official_views(model: Emu3) -> dict[str, Tensor]:
    """Every weight under its official name, as a view into the parameters of ``model``."""
    s = model.settings
    keys = s.kv_heads * s.head_width
    views = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head.weight,
    }
    for number, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split((s.heads * s.head_width, keys, keys))
        gate, up = block.mlp.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.down.weight,
            "input_layernorm": block.attention_norm,
            "post_attention_layernorm": block.mlp_norm,
        }
        views |= {f"model.layers.{number}.{name}.weight": view for name, view in parts.items()}
    return {name: view.detach() for name, view in views.items()}


def save_decoder(path: Path, model: Emu3) -> None:
    """Write ``model`` in the official layout, its settings in the file's metadata."""
    tensors = {name: view.clone() for name, view in official_views(model).items()}
    save_tensors(path, tensors, {"decoder": model.settings.model_dump_json()})


def load_decoder(path: Path) -> Emu3:
    """Build the decoder that ``save_decoder`` wrote."""
    model = Emu3(_settings(path, "decoder", ModelSettings))
    load_decoder_into(model, path)
    return model.eval()


def load_decoder_into(model: Emu3, path: Path) -> None:
    """Fill ``model`` from a file, or a folder of shards, in any known layout.

    Official and Hugging Face names are understood; a vision tokenizer in the same file is
    passed over. Values are rounded to the dtype of ``model``.

    Raises:
        ValueError: one line, if the file is not safetensors or of another configuration.
    """
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not shards:
        raise ValueError(f"weights: no .safetensors file in {path}")
    missing = official_views(model)
    for shard in shards:
        with _opened(shard) as file:
            for foreign in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if not _VISION.match(foreign):
                    name = _official(foreign)
                    _copy(missing.pop(name, None), file.get_tensor(foreign), name, path)
    _nothing_missing(missing, path)


def save_vision(path: Path, tokenizer: VisionTokenizer) -> None:
    """Write the vision tokenizer, its settings in the file's metadata."""
    tensors = {name: value.contiguous() for name, value in tokenizer.state_dict().items()}
    save_tensors(path, tensors, {"vision": tokenizer.settings.model_dump_json()})


def load_vision(path: Path) -> VisionTokenizer:
    """Build the vision tokenizer that ``save_vision`` wrote."""
    tokenizer = VisionTokenizer(_settings(path, "vision", VisionSettings))
    fill(tokenizer, read_tensors(path)[0], path)
    return tokenizer.eval()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    with replacing(path) as draft:
        save_file(dict(tensors), draft, metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``tensors`` into the parameters and buffers of ``module``; the names must agree."""
    missing = dict(module.state_dict())
    for name, value in tensors.items():
        _copy(missing.pop(name, None), value, name, path)
    _nothing_missing(missing, path)


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise ValueError(f"weights: no file {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as fault:
        raise ValueError(f"weights: {path} is not a safetensors file: {fault}") from None


def _settings(path: Path, part: str, kind: type[Settings]) -> Settings:
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if part not in metadata:
        raise ValueError(f"weights: {path} holds no {part}; it holds {', '.join(metadata) or '?'}")
    return parse(kind, json.loads(metadata[part]))


def _official(name: str) -> str:
    for pattern, prefix in _FOREIGN:
        name = pattern.sub(prefix, name)
    return name


@torch.no_grad()
def _copy(view: Tensor | None, value: Tensor, name: str, path: Path) -> None:
    if view is None:
        raise ValueError(f"weights: {path} is of another configuration: {name} has no place here")
    if view.shape != value.shape:
        raise ValueError(
            f"weights: {path} is of another configuration: {name} is {tuple(value.shape)}, "
            f"expected {tuple(view.shape)}"
        )
    view.copy_(value)


def _nothing_missing(missing: Mapping[str, Tensor], path: Path) -> None:
    if missing:
        raise ValueError(
            f"weights: {path} is of another configuration: it lacks {next(iter(missing))} and "
            f"{len(missing) - 1} more"
        )
