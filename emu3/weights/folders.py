"""A model as the folder that others read: the official layout, and both of Hugging Face's."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from emu3.files import replacing
from emu3.model import Emu3
from emu3.text import QwenTokenizer
from emu3.vision import VisionTokenizer
from emu3.weights.decoder import official_views
from emu3.weights.files import save_tensors
from emu3.weights.hub import VISION_FOLDER, decoder_config, huggingface_config, vision_config
from emu3.weights.load import Pretrained
from emu3.weights.vision import huggingface_tensors, official_tensors

Layout = Literal["official", "hub", "runtime"]
"""Official folders; Hugging Face's as its hub has them, and as its classes save them today."""

_SHARD = 4 << 30
"""Bytes of a file, at most, unless one tensor is larger."""
_PREFIXES = {
    "hub": {"model.": "text_model.model.", "lm_head.": "text_model.lm_head.", "vision": "vqmodel."},
    "runtime": {"model.": "model.text_model.", "lm_head.": "lm_head.", "vision": "model.vqmodel."},
}


def save(folder: Path, loaded: Pretrained, layout: Layout) -> None:
    """Write ``loaded`` as a folder in ``layout``, which :func:`load` and others read.

    The weights are sharded, with an index and ``config.json``; the official vision tokenizer is a
    folder of its own inside. Hugging Face's layouts get the files of its processor too.

    Raises:
        ValueError: one line, if the layout is unknown, or the folder holds weights already.
        OSError: one line, if a file cannot be written.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"save: layout must be one of {get_args(Layout)}, got {layout!r}")
    if not isinstance(loaded.text, QwenTokenizer):
        raise ValueError("save: published layouts have Qwen's vocabulary, got a decoder of bytes")
    if folder.is_dir() and any(folder.glob("*.safetensors*")):
        raise ValueError(f"save: {folder} must hold no weights, got some: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "official":
        _save_official(folder, loaded.model, loaded.vision, loaded.text)
    else:
        _save_huggingface(folder, loaded, layout)


def _save_official(
    folder: Path, model: Emu3, tokenizer: VisionTokenizer, text: QwenTokenizer
) -> None:
    inner = folder / VISION_FOLDER
    inner.mkdir(exist_ok=True)
    _save_shards(inner, official_tensors(tokenizer))
    _write_json(inner / "config.json", vision_config(tokenizer.settings))
    with replacing(folder / "emu3.tiktoken") as draft:
        draft.write_bytes(text.as_tiktoken())
    _save_shards(folder, official_views(model))
    _write_json(folder / "config.json", decoder_config(model.settings))


def _save_huggingface(folder: Path, loaded: Pretrained, layout: str) -> None:
    from emu3.weights import processor  # transformers is slow to import

    prefixes = _PREFIXES[layout]
    tensors = {}
    for name, view in official_views(loaded.model).items():
        kind = "lm_head." if name.startswith("lm_head.") else "model."
        tensors[prefixes[kind] + name.removeprefix(kind)] = view
    for name, value in huggingface_tensors(loaded.vision).items():
        tensors[prefixes["vision"] + name] = value
    processor.save_processor(folder, loaded.text)
    _save_shards(folder, tensors)
    config = huggingface_config(loaded.model.settings, loaded.vision.settings)
    _write_json(folder / "config.json", config)


def _save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write numbered files, then their index; a folder without it was not finished."""
    shards = list(_shards(tensors))
    if len(shards) == 1:
        _save_shard(folder / "model.safetensors", tensors, shards[0])
        return
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save_shard(folder / file, tensors, names)
        places |= dict.fromkeys(names, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names, size = [], 0
    for name, value in tensors.items():
        if names and size + value.nbytes > _SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    yield names


def _save_shard(path: Path, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    copies = {name: tensors[name].contiguous().cpu().clone() for name in names}
    save_tensors(path, copies, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")
