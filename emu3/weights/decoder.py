"""The decoder's weights, in and out.

On disk the decoder has the layout of the official Emu3 files, one tensor per projection; in
memory queries, keys and values share a matrix, and so do gate and up. ``official_views`` maps
the one onto the other for saving and loading.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3.weights.adapter import Adapter
from emu3.weights.files import (
    Headers,
    Stored,
    check_place,
    copy,
    nothing_missing,
    read_headers,
    save_tensors,
    without_memory,
)
from emu3.weights.hub import decoder_settings
from emu3.weights.quantized import Weights, check_weights, quantize_linears
from emu3_kernels.modules import RotaryEmbedding, speed_up_bfloat16

# Prefixes of the Hugging Face files (as converted, and as their runtime saves) -> official.
_FOREIGN = (
    (re.compile(r"^(text_model\.model|model\.text_model)\."), "model."),
    (re.compile(r"^text_model\.lm_head\."), "lm_head."),
)
_VISION = re.compile(r"^(model\.)?vqmodel\.")
_EMBEDDING = "model.embed_tokens.weight"


def official_views(model: Emu3) -> dict[str, Tensor]:
    """Every weight under its official name, as a view into the parameters of ``model``.

    Raises:
        ValueError: one line, if ``model`` has LoRA adapters: its weights alone are another model.
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("weights: a decoder with adapters must be merged first")
    views = _outer_views(model)
    for number in range(len(model.blocks)):
        views |= _block_views(model, number)
    return views


def _outer_views(model: Emu3) -> dict[str, Tensor]:
    views = {
        _EMBEDDING: model.embedding.weight,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head.weight,
    }
    return {name: view.detach() for name, view in views.items()}


def _block_views(model: Emu3, number: int) -> dict[str, Tensor]:
    s, block = model.settings, model.blocks[number]
    keys = s.num_kv_heads * s.head_dim
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
    return {f"model.layers.{number}.{name}.weight": view.detach() for name, view in parts.items()}


def save_decoder(path: Path, model: Emu3) -> None:
    """Write ``model`` in the official layout, its settings in the file's metadata."""
    tensors = {name: view.clone() for name, view in official_views(model).items()}
    save_tensors(path, tensors, {"decoder": model.settings.model_dump_json()})


def load_decoder(
    path: Path | Headers,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    adapter: Adapter | None = None,
) -> Emu3:
    """Build the decoder of a file, or of a folder of shards, in any known layout.

    The shape comes from the metadata of our files, or else from ``config.json`` in the folder.
    Weights go in pieces straight into the packed projections, so that the host never holds more
    than the model itself and 32 MiB.

    Args:
        path: official and Hugging Face names are read; a vision tokenizer in the same files is
            passed over. Headers that were read need not be read again.
        device: of the model.
        dtype: of the model; None keeps that of the embedding.
        weights: quantizes the linear layers, each as soon as it is read, as :func:`quantize` does.
        adapter: is merged into the weights.

    Raises:
        ValueError: one line that names what is missing, unexpected, of another shape or not finite.
    """
    headers = path if isinstance(path, Headers) else read_headers(path)
    path = headers.path
    settings = headers.settings("decoder", ModelSettings) or decoder_settings(path)
    if settings is None:
        raise ValueError(f"weights: {path} holds no decoder; it holds {headers.parts}")
    if weights is not None:
        check_weights(weights, device)
    found = _stored(headers)
    if adapter is not None:
        found = adapter.merged(found, _official)
    if dtype is None:
        stored = found[_EMBEDDING].dtype if _EMBEDDING in found else torch.float32
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    with without_memory():
        model = Emu3(settings)
    model.to(dtype)
    if weights is None:
        _fill(model.to_empty(device=device), found, path)
    else:
        _fill_quantized(model, found, path, torch.device(device), weights)
    model.rotate = RotaryEmbedding(
        settings.max_position_embeddings,
        settings.head_dim,
        theta=settings.rope_theta,
        device=device,
    )
    return speed_up_bfloat16(model.eval())


def load_decoder_into(model: Emu3, path: Path) -> None:
    """Fill ``model`` as :func:`load_decoder` does; values are rounded to its dtype."""
    _fill(model, _stored(read_headers(path)), path)


def _stored(headers: Headers) -> dict[str, Stored]:
    """The decoder's tensors under official names."""
    found = headers.tensors
    return {_official(name): found[name] for name in found if not _VISION.match(name)}


def _fill(model: Emu3, found: Mapping[str, Stored], path: Path) -> None:
    missing = official_views(model)
    for name, value in found.items():
        copy(missing.pop(name, None), value, name, path)
    nothing_missing(missing, path)


def _fill_quantized(
    model: Emu3,
    found: Mapping[str, Stored],
    path: Path,
    device: torch.device,
    weights: Weights,
) -> None:
    """Give a ``model`` on ``meta`` memory layer by layer; each is quantized before the next."""
    expected = official_views(model)
    for name, value in found.items():
        check_place(expected.get(name), value, name, path)
    nothing_missing({name: view for name, view in expected.items() if name not in found}, path)

    def fill(views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            copy(view, found[name], name, path)

    for part in (model.embedding, model.head):
        part.to_empty(device=device)
    model.norm = nn.Parameter(torch.empty_like(model.norm, device=device))
    fill(_outer_views(model))
    quantize_linears(model, weights, names=("head",))
    for number, block in enumerate(model.blocks):
        block.to_empty(device=device)
        fill(_block_views(model, number))
        quantize_linears(block, weights)
    model.requires_grad_(False)


def _official(name: str) -> str:
    for pattern, prefix in _FOREIGN:
        name = pattern.sub(prefix, name)
    return name
