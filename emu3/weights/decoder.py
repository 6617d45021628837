"""The decoder's weights, in and out.

On disk the decoder has the layout of the official Emu3 files, one tensor per projection; in
memory queries, keys and values share a matrix, and so do gate and up. ``official_views`` maps
the one onto the other for saving and loading.
"""

import re
from pathlib import Path

from torch import Tensor

from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3.weights.files import (
    copy,
    nothing_missing,
    opened,
    parts_of,
    read_settings,
    save_tensors,
    shards_of,
)
from emu3_kernels.modules import speed_up_bfloat16

# Prefixes of the Hugging Face files (as converted, and as their runtime saves) -> official.
_FOREIGN = (
    (re.compile(r"^(text_model\.model|model\.text_model)\."), "model."),
    (re.compile(r"^text_model\.lm_head\."), "lm_head."),
)
_VISION = re.compile(r"^(model\.)?vqmodel\.")


def official_views(model: Emu3) -> dict[str, Tensor]:
    """Every weight under its official name, as a view into the parameters of ``model``."""
    s = model.settings
    keys = s.num_kv_heads * s.head_dim
    views = {
        "model.embed_tokens.weight": model.embedding.weight,
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


def load_decoder(path: Path) -> Emu3:
    """Build the decoder that ``save_decoder`` wrote."""
    settings = read_settings(path, "decoder", ModelSettings)
    if settings is None:
        raise ValueError(f"weights: {path} holds no decoder; it holds {parts_of(path)}")
    model = Emu3(settings)
    load_decoder_into(model, path)
    return speed_up_bfloat16(model.eval())


def load_decoder_into(model: Emu3, path: Path) -> None:
    """Fill ``model`` from a file, or a folder of shards, in any known layout.

    Official and Hugging Face names are read; a vision tokenizer in the same file is ignored. Values
    are rounded to the dtype of ``model``.

    Raises:
        ValueError: one line, if the file is not safetensors, of another configuration or not
            finite in the dtype of ``model``.
    """
    missing = official_views(model)
    for shard in shards_of(path):
        with opened(shard) as file:
            for foreign in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if not _VISION.match(foreign):
                    name = _official(foreign)
                    copy(missing.pop(name, None), file.get_tensor(foreign), name, path)
    nothing_missing(missing, path)


def _official(name: str) -> str:
    for pattern, prefix in _FOREIGN:
        name = pattern.sub(prefix, name)
    return name
