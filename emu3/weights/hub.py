"""``config.json`` of the published folders: official, and Hugging Face's with its nested parts."""

import json
from pathlib import Path
from typing import Any

from emu3.config import EMU3_VOCABULARY, ModelSettings, VisionSettings, parse
from emu3.settings import SettingsError

FILE = "config.json"
VISION_FOLDER = "Emu3-VisionTokenizer"
"""Name of the official folder of the vision tokenizer."""

IMAGE = 151646
"""Hugging Face's id of ``<image>``, which stands for the codes of an image."""

_NAMES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "dropout",
    "initializer_range": "init_std",
}
"""Of the decoder: their names, and ours."""
_FIXED = {
    "vocab_size": EMU3_VOCABULARY.size,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "quantization_config": None,
}
"""What no setting of ours can change."""
_VISION_NAMES = {
    "base_channels": "ch",
    "multipliers": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_stages": "attn_resolutions",
    "temporal_factor": "temporal_downsample_factor",
    "num_codes": "codebook_size",
    "code_width": "embed_dim",
}
"""Of the vision tokenizer: our names, and official ones."""
_RENAMED = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}
"""Official names that Hugging Face changed."""


def decoder_settings(path: Path) -> ModelSettings | None:
    """The decoder's settings in the ``config.json`` of a folder, or beside a file, if it has any.

    Raises:
        ValueError: one line, if the file is damaged or of a model that is not Emu3.
    """
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return None
    config = read_config(file)
    told = config.get("text_config") or config
    if "num_hidden_layers" not in told:
        return None
    rope = told.get("rope_parameters") or {}
    told = told | {name: rope[name] for name in ("rope_theta",) if name in rope}
    if rope.get("rope_type", "default") != "default":
        told["rope_scaling"] = rope["rope_type"]
    for name, value in _FIXED.items():
        if (got := told.get(name, value)) != value:
            raise ValueError(f"weights: {file}: {name} must be {json.dumps(value)}, got {got!r}")
    settings = {ours: told[name] for name, ours in _NAMES.items() if told.get(name) is not None}
    try:
        settings.setdefault("head_dim", settings["hidden_size"] // settings["num_heads"])
        settings.setdefault("num_kv_heads", settings["num_heads"])
        return parse(ModelSettings, settings | {"vocabulary": EMU3_VOCABULARY.model_dump()})
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"weights: {file} lacks a size of the decoder: {error}") from None
    except SettingsError as error:
        raise ValueError(f"weights: {file}: {error}") from None


def read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"weights: {file} is not a JSON object")
    return config


def decoder_config(settings: ModelSettings) -> dict[str, Any]:
    """The official ``config.json`` of a decoder."""
    ids = settings.vocabulary
    own = settings.model_dump(mode="json")
    sizes = {theirs: own[ours] for theirs, ours in _NAMES.items()}
    fixed = {name: value for name, value in _FIXED.items() if value is not None}
    special = {"pad": ids.pad, "bos": ids.bos, "eos": ids.eos, "img": ids.img_token}
    special |= {"boi": ids.boi, "eoi": ids.eoi, "eol": ids.eol, "eof": ids.eof}
    special = {f"{name}_token_id": value for name, value in special.items()}
    return {"architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", **sizes, **fixed, **special}


def vision_config(settings: VisionSettings) -> dict[str, Any]:
    """The official ``config.json`` of a vision tokenizer."""
    own = settings.model_dump(mode="json")
    sizes = {theirs: own[ours] for ours, theirs in _VISION_NAMES.items()}
    fixed = {"z_channels": settings.code_width, "double_z": False}
    fixed |= {"in_channels": 3, "out_channels": 3, "dropout": 0.0}
    return {"architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ", **sizes, **fixed}


def huggingface_config(model: ModelSettings, vision: VisionSettings) -> dict[str, Any]:
    """Hugging Face's ``config.json`` of a whole model."""
    text = decoder_config(model) | {"model_type": "emu3_text_model"}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text = {name: v for name, v in text.items() if name != "architectures"}
    vq = {_RENAMED.get(name, name): value for name, value in vision_config(vision).items()}
    vq |= {"model_type": "emu3_vqgan", "hidden_size": vision.widths[-1], "num_attention_heads": 1}
    del vq["architectures"], vq["dropout"]
    ids = model.vocabulary
    codes = {f"<|visual token {n:06}|>": ids.visual_start + n for n in range(ids.num_visual)}
    return {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": "emu3",
        "text_config": text | {"rope_parameters": rope},
        "vq_config": vq,
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": ids.eol, **codes},
        "tie_word_embeddings": False,
    }
