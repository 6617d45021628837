"""The decoder's weights, in and out.

On disk the decoder has the layout of the official Emu3 files, one tensor per projection; in
memory queries, keys and values share a matrix, and so do gate and up. ``official_views`` maps
the one onto the other for saving and loading.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3.weights.files import (
    Stored,
    copy,
    nothing_missing,
    parts_of,
    read_settings,
    save_tensors,
    shards_of,
    stored_in,
)
from emu3.weights.hub import decoder_settings
from emu3_kernels.modules import RotaryEmbedding, speed_up_bfloat16

# Prefixes of the Hugging Face files (as converted, and as their runtime saves) -> official.
_FOREIGN = (
    (re.compile(r"^(text_model\.model|model\.text_model)\."), "model."),
    (re.compile(r"^text_model\.lm_head\."), "lm_head."),
)
_VISION = re.compile(r"^(model\.)?vqmodel\.")
_EMBEDDING = "model.embed_tokens.weight"


def official_views(model: Emu3) -> dict[str, Tensor]:
    """Every weight under its official name, as a view into the parameters of ``model``."""
    s = model.settings
    keys = s.num_kv_heads * s.head_dim
    views = {
        _EMBEDDING: model.embedding.weight,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head.weight,
    }
    for number, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split((s.num_heads * s.head_dim, keys, keys))
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


def load_decoder(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Emu3:
    """Build the decoder of a file, or of a folder of shards, in any known layout.

    The shape comes from the metadata of our files, or else from ``config.json`` in the folder.
    Weights go in pieces straight into the packed projections, so that the host never holds more
    than the model itself and 32 MiB.

    Args:
        path: official and Hugging Face names are read; a vision tokenizer in the same files is
            passed over.
        device: of the model.
        dtype: of the model; None keeps that of the embedding.

    Raises:
        ValueError: one line that names what is missing, unexpected, of another shape or not finite.
    """
    shards = shards_of(path)
    settings = read_settings(shards[0], "decoder", ModelSettings) or decoder_settings(path)
    if settings is None:
        raise ValueError(f"weights: {path} holds no decoder; it holds {parts_of(shards[0])}")
    found = _stored(shards)
    if dtype is None:
        stored = found[_EMBEDDING].dtype if _EMBEDDING in found else torch.float32
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = Emu3(settings)
    model.to(dtype).to_empty(device=device)
    model.rotate = RotaryEmbedding(
        settings.max_position_embeddings,
        settings.head_dim,
        theta=settings.rope_theta,
        device=device,
    )
    _fill(model, found, path)
    return speed_up_bfloat16(model.eval())


def load_decoder_into(model: Emu3, path: Path) -> None:
    """Fill ``model`` as :func:`load_decoder` does; values are rounded to its dtype."""
    _fill(model, _stored(shards_of(path)), path)


def _stored(shards: list[Path]) -> dict[str, Stored]:
    """The decoder's tensors under official names."""
    found = stored_in(shards)
    return {_official(name): found[name] for name in found if not _VISION.match(name)}


def _fill(model: Emu3, found: Mapping[str, Stored], path: Path) -> None:
    missing = official_views(model)
    for name, value in found.items():
        copy(missing.pop(name, None), value, name, path)
    nothing_missing(missing, path)


def _official(name: str) -> str:
    for pattern, prefix in _FOREIGN:
        name = pattern.sub(prefix, name)
    return name
